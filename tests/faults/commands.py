"""Ctrl-C at random moments of a command."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import onnx

from .jobs import folder_for, onnx_model
from .outcomes import Trials

CHECKED = "exit code 130; nothing on stderr; the whole file or none; nothing temporary"
READY = "import klquant; print(flush=True); from klquant.__main__ import main; main()"  # what comes before is NumPy's


def interrupt_commands(times, seed):
    """Interrupt `klquant calibrate` so many times."""
    trials, rng = Trials("Ctrl-C, klquant calibrate", CHECKED), np.random.default_rng(seed)
    with folder_for("command") as folder:
        onnx.save(onnx_model(), folder / "model.onnx")
        np.save(folder / "data.npy", rng.normal(size=(2000, 1, 12, 12)).astype(np.float32))
        begin = time.monotonic()
        done, *_, expected = _run(folder, 60)
        seconds, left = time.monotonic() - begin, 0
        trials.expect(done.returncode == 0, done.stderr)
        while trials.outcomes.total() < times:
            done, was_running, temporary, result = _run(folder, rng.uniform(0, seconds))
            if was_running:
                _judge(done, result, expected, trials)
                left += bool(temporary)
    trials.expect(left <= 1 + times // 50, f"{left} folders for temporary files are left")  # their removal is cut off
    return [trials.row()]


def _judge(done, result, expected, trials):
    """Say how an interrupted command ended, and what is wrong with that."""
    too_late = done.returncode in (0, -signal.SIGINT) and result == expected
    outcome = "too late, Python was ending" if too_late else f"exit code {done.returncode}"
    trials.add(f"{outcome}, {'with' if result else 'no'} file")
    trials.expect(too_late or (done.returncode, done.stderr) == (130, ""), f"{outcome}: {done.stderr}")
    trials.expect(result in (b"", expected), f"{outcome}: another result")


def _run(folder, interrupt_after):
    """Run the command; return how it ended, whether it was still running then, temporary files and the result."""
    command = [sys.executable, "-c", READY, "calibrate", "model.onnx", "--data", "data.npy", "--out", "out/file.npz"]
    (folder / "temporary").mkdir()
    where = {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "TMPDIR": str(folder / "temporary")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=folder, env={**os.environ, **where}, **pipes) as process:
        was_running = False
        process.stdout.readline()
        try:
            output = process.communicate(timeout=interrupt_after)
        except subprocess.TimeoutExpired:
            was_running = True
            process.send_signal(signal.SIGINT)
            output = process.communicate(timeout=60)
    temporary = {path.name for path in (folder / "temporary").iterdir()} - {".ses"}
    temporary |= {path.name for path in (folder / "out").glob(".*")}
    result = folder / "out" / "file.npz"
    content = result.read_bytes() if result.exists() else b""
    shutil.rmtree(folder / "temporary")
    shutil.rmtree(folder / "out", ignore_errors=True)
    return subprocess.CompletedProcess(command, process.returncode, *output), was_running, temporary, content
