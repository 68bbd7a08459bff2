"""Ctrl-C at random moments during a command."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx

from .jobs import folder_for, onnx_model
from .outcomes import Trials

CHECKED = "exit code 130; nothing on stderr; the whole file or none; nothing temporary"
# a line means that the imports are done; klquant does not handle Ctrl-C before that
READY = "import klquant; print(flush=True); from klquant.__main__ import main; main()"


class Ended(NamedTuple):
    code: int
    stderr: str
    was_running: bool
    """Whether the command still ran when it was to be interrupted."""
    result: bytes
    temporary: frozenset[str]
    """Names of the temporary files that it left."""


def interrupt_commands(times, seed):
    """Interrupt `klquant calibrate` a number of times."""
    trials, rng = Trials("Ctrl-C, klquant calibrate", CHECKED), np.random.default_rng(seed)
    with folder_for("command") as folder:
        onnx.save(onnx_model(), folder / "model.onnx")
        np.save(folder / "data.npy", rng.normal(size=(2000, 1, 12, 12)).astype(np.float32))
        begin = time.monotonic()
        expected = _run(folder, 60)
        seconds = time.monotonic() - begin
        trials.expect(expected.code == 0, expected.stderr)
        while trials.outcomes.total() < times:
            ended = _run(folder, rng.uniform(0, seconds))
            if ended.was_running:
                _judge(ended, expected, trials)
    return [trials.row()]


def _judge(ended, expected, trials):
    """Return how an interrupted command ended, and what is wrong with that."""
    too_late = ended.code in (0, -signal.SIGINT) and ended.result == expected.result
    outcome = "too late, Python was ending" if too_late else f"exit code {ended.code}"
    trials.add(f"{outcome}, {'with' if ended.result else 'no'} file")
    trials.expect(too_late or (ended.code, ended.stderr) == (130, ""), f"{outcome}: {ended.stderr}")
    trials.expect(ended.result in (b"", expected.result), f"{outcome}: another result")
    trials.expect(not ended.temporary, f"{outcome}: there are {sorted(ended.temporary)}")


def _run(folder, interrupt_after):
    """Run the command in a new folder for its output."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        out = Path(name, "out.npz")
        command = [sys.executable, "-c", READY, "calibrate", "model.onnx", "--data", "data.npy", "--out", str(out)]
        settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "TMPDIR": name}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, cwd=folder, env=settings, **pipes) as process:
            process.stdout.readline()
            was_running = False
            try:
                process.wait(interrupt_after)
            except subprocess.TimeoutExpired:
                was_running = True
                process.send_signal(signal.SIGINT)
            stderr = process.communicate(timeout=60)[1]
        result = out.read_bytes() if out.exists() else b""
        left = frozenset(path.name for path in Path(name).iterdir()) - {".ses", out.name}  # `.ses` is from onnxruntime
        return Ended(process.returncode, stderr, was_running, result, left)
