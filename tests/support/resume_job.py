"""A calibration that ends in the middle: see torch/test_checkpoint.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # to run as a script

import os
import signal

from torch import float32, nn

from klquant.backends.torch import quantize
from klquant.backends.torch.model.forward import call_model
from support.networks import batch, ready

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


def job(state, checkpoint, result, die_after):
    """Calibrate in a new process, which exits after a number of runs of the model (0: never)."""
    calibrate(checkpoint, die_after=die_after).save(result)
