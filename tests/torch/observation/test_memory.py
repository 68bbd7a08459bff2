"""Memory does not grow with the data.

glibc is told to give freed blocks back: else its own heap, which wanders by two to four percent also where a model is
only run, would hide what is looked for here.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import resident

JOB = Path(__file__).parents[2] / "support" / "memory_job.py"


def peak(number, passes, keep_bytes=0):
    command = [sys.executable, str(JOB), str(number), str(passes), str(keep_bytes)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, env=environment)
    return int(done.stdout)


@pytest.mark.skipif(not resident.STATUS.exists(), reason="only Linux tells the peak of a process without its parent's")
@pytest.mark.parametrize("passes", [1, 2])
def test_1437_images_take_as_much_memory_as_64(passes):
    few, many = peak(64, passes), peak(1437, passes)
    assert many <= 1.01 * few


@pytest.mark.skipif(not resident.STATUS.exists(), reason="only Linux tells the peak of a process without its parent's")
def test_what_is_kept_takes_no_more_memory_than_it_may():
    """The activations of 1437 images have 240 MiB."""
    keep_bytes = 2**26
    more = peak(1437, 2, keep_bytes) - peak(1437, 2)
    assert 0.8 * keep_bytes <= 2**10 * more <= 1.1 * keep_bytes
