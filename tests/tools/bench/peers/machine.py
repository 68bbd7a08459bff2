"""The machine that runs the benchmarks: pin the process to one core, and describe the machine."""

import contextlib
import datetime
import importlib.util
import os
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import klquant

ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


@contextlib.contextmanager
def one_core():
    """Pin this process and its children to one core, and return how far that succeeded."""
    with pytest.MonkeyPatch.context() as environment, contextlib.ExitStack() as limits:
        for variable in ONE_THREAD:
            environment.setenv(variable, "1")
        blas = "BLAS threads as the environment said when NumPy was imported"
        if importlib.util.find_spec("threadpoolctl"):
            limits.enter_context(importlib.import_module("threadpoolctl").threadpool_limits(1))
            blas = "1 BLAS thread"
        pinned = limits.enter_context(_pinned())
        yield f"{pinned} of {os.cpu_count()}, {blas}"


@contextlib.contextmanager
def _pinned():
    if not hasattr(os, "sched_setaffinity"):
        yield "not pinned: no sched_setaffinity here, all"
        return
    before = os.sched_getaffinity(0)
    _pin({max(before)})
    try:
        yield "pinned to 1"
    finally:
        _pin(before)


def _pin(cores):
    """Pin the existing threads. New ones inherit it, and XLA makes its pool as large as this set."""
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), cores)


def provenance(cores):
    """Return what was measured, on which machine, and when."""
    jax = importlib.import_module("jax").__version__ if importlib.util.find_spec("jax") else "none"
    return {
        "Python": platform.python_version(),
        "numpy": np.__version__,
        "jax": jax,
        "klquant": f"{klquant.__version__} from {Path(klquant.__file__).parent}",
        "CPU": _cpu_model(),
        "cores": cores,
        "load": f"{os.getloadavg()[0]:.1f} before the run",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
    }


def _cpu_model():
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit():
    git = shutil.which("git")
    if git is None:
        return "unknown"
    command = [git, "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
