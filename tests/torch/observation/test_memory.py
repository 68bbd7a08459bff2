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


def peak(number, passes):
    command = [sys.executable, str(JOB), str(number), str(passes)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, env=environment)
    return int(done.stdout)


@pytest.mark.skipif(not resident.STATUS.exists(), reason="only Linux tells the peak of a process without its parent's")
@pytest.mark.parametrize("passes", [1, 2])
def test_1437_images_take_as_much_memory_as_64(passes):
    few, many = peak(64, passes), peak(1437, passes)
    assert many <= 1.01 * few
