"""A calibration that is killed on the way, see torch/test_checkpoint.py.

Arguments: the checkpoint file, the file for the result, and after which run of the model to die (0: not at all).
"""

import os
import signal
import sys
from pathlib import Path

from klquant.backends.torch import quantize
from klquant.backends.torch.running import call_model
from networks import batch, ready
from torch import float32, nn

NUM_BATCHES = 7


def network():
    parts = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)]
    return ready(nn.Sequential(*parts), dtype=float32)


def batches():
    return [batch(64, 1, 8, 8, seed=k, dtype=float32) for k in range(NUM_BATCHES)]


def calibrate(checkpoint, *, die_after=0, **options):
    runs = 0

    def forward(model, item):
        nonlocal runs
        runs += 1
        if runs == die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return call_model(model, item)

    options = {"resume": checkpoint, "checkpoint_seconds": 0.0, "num_bins": 801, "forward": forward, **options}
    return quantize(network(), batches(), **options).calibration


if __name__ == "__main__":
    calibrate(Path(sys.argv[1]), die_after=int(sys.argv[3])).save(sys.argv[2])
