"""Memory does not grow with the data; torch/test_memory.py says what is measured and how."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import resident

JOB = Path(__file__).parents[1] / "support" / "onnx_memory_job.py"


def peak(number, keep_bytes=0):
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, str(JOB), str(number), str(keep_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, env=environment)
    return int(done.stdout)


@pytest.mark.skipif(not resident.STATUS.exists(), reason="only Linux reports the peak of one process")
def test_1437_images_take_as_much_memory_as_64():
    assert peak(1437) <= 1.05 * peak(64)


@pytest.mark.skipif(not resident.STATUS.exists(), reason="only Linux reports the peak of one process")
def test_what_is_kept_takes_no_more_memory_than_it_may():
    """The activations of 1437 images have 270 MiB."""
    keep_bytes = 2**26
    more = peak(1437, keep_bytes) - peak(1437)
    assert 0.8 * keep_bytes <= 2**10 * more <= 1.2 * keep_bytes
