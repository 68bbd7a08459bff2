"""Ctrl-C at random moments of a command."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import onnx

from .jobs import folder_for, onnx_model
from .outcomes import Trials

CHECKED = "exit code 130; nothing said; the whole file or none; nothing temporary (but onnxruntime's own `.ses`)"
READY = "import klquant; print(flush=True); from klquant.__main__ import main; main()"  # what comes before is NumPy's


def interrupt_commands(times, seed):
    """Interrupt `klquant calibrate` so many times."""
    trials, rng = Trials("Ctrl-C, klquant calibrate", CHECKED), np.random.default_rng(seed)
    with folder_for("command") as folder:
        (folder / "temporary").mkdir()
        onnx.save(onnx_model(), folder / "model.onnx")
        np.save(folder / "data.npy", rng.normal(size=(2000, 1, 12, 12)).astype(np.float32))
        out, begin = folder / "out.npz", time.monotonic()
        done, _ = _run(folder, 60)
        seconds, expected = time.monotonic() - begin, out.read_bytes()
        trials.expect(done.returncode == 0, done.stderr)
        while trials.outcomes.total() < times:
            out.unlink(missing_ok=True)
            done, was_running = _run(folder, rng.uniform(0, seconds))
            if was_running:
                _judge(done, folder, expected, trials)
    return [trials.row()]


def _judge(done, folder, expected, trials):
    """Say how an interrupted command ended, and what is wrong with that."""
    result = (folder / "out.npz").read_bytes() if (folder / "out.npz").exists() else b""
    too_late = done.returncode in (0, -signal.SIGINT) and result == expected
    outcome = "Python was already ending" if too_late else f"exit code {done.returncode}"
    trials.add(f"{outcome}, {'with' if result else 'no'} file", (too_late or done.returncode == 130, done.stderr))
    left = {path.name for path in [*(folder / "temporary").iterdir(), *folder.glob(".*")]} - {".ses"}
    trials.expect(not done.stderr, f"{outcome}: {done.stderr}")
    trials.expect(result in (b"", expected), f"{outcome}: another result")
    trials.expect(not left, f"{outcome}: there are {left}")


def _run(folder, interrupt_after):
    """Run the command; tell how it ended, and whether it was still running when it was to be interrupted."""
    command = [sys.executable, "-c", READY, "calibrate", "model.onnx", "--data", "data.npy", "--out", "out.npz"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "temporary")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment, **pipes) as process:
        was_running = False
        process.stdout.readline()
        try:
            output = process.communicate(timeout=interrupt_after)
        except subprocess.TimeoutExpired:
            was_running = True
            process.send_signal(signal.SIGINT)
            output = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, *output), was_running
