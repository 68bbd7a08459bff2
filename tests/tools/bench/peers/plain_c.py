"""Peer: the O(n^2) float64 loops in plain C, compiled if there is a compiler."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np

SOURCE = Path(__file__).with_name("plain_loops.c")
COUNTS = np.ctypeslib.ndpointer(np.int64, flags="C_CONTIGUOUS")
NUMBERS = np.ctypeslib.ndpointer(np.float64, flags="C_CONTIGUOUS")


def compile_curve(folder):
    """Return ``divergence_curve(hist)`` in C, built with ``-O2`` in `folder`; None without a compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return None
    library = Path(folder) / "plain_loops.so"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", str(SOURCE), "-o", str(library), "-lm"], check=True)
    function = ctypes.CDLL(str(library)).divergence_curve
    function.argtypes = [COUNTS, ctypes.c_int64, ctypes.c_int64, ctypes.c_double, NUMBERS, NUMBERS, NUMBERS]
    function.restype = None

    def divergence_curve(hist, num_quantized_bins=255, eps=1e-4):
        curve = np.empty(len(hist) // 2 - num_quantized_bins // 2 + 1)
        room = np.empty((2, len(hist)))
        function(np.ascontiguousarray(hist, np.int64), len(hist), num_quantized_bins, eps, room[0], room[1], curve)
        return curve

    return divergence_curve
