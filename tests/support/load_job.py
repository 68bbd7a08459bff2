"""Calibrate, save, load, search and report a model with many layers, and print the cost of each: see bench_load.py.

Arguments: the number of layers, and a folder. Prints JSON: for each step its seconds, and the peak memory in MiB.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # to run as a script

import json
import time
import warnings

import torch
from torch import nn

from klquant.backends.report import describe, render_html
from klquant.backends.torch import Calibration, quantize
from klquant.errors import CalibrationWarning
from support import resident

NUM_BINS, WIDTH = 8001, 16


class Wide(nn.Module):
    """Many layers side by side, each with its own input."""

    def __init__(self, number):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(number))

    def forward(self, x):
        return sum(layer(x + 0.01 * k) for k, layer in enumerate(self.layers))


def main(number, folder):
    warnings.simplefilter("ignore", CalibrationWarning)  # about too few values for 8001 bins
    torch.manual_seed(0)
    model, batches = Wide(number).eval(), [torch.randn(256, WIDTH) for _ in range(2)]
    quantize(Wide(2).eval(), batches, num_bins=NUM_BINS)  # warm up: imports and caches
    steps, file = {}, folder / "many.npz"

    def step(name, function):
        start = time.perf_counter()
        result = function()
        steps[name] = (time.perf_counter() - start, resident.peak() / 1024)
        return result

    step("nothing", lambda: None)
    made = step("calibrated", lambda: quantize(model, batches, num_bins=NUM_BINS).calibration)
    step("saved", lambda: made.save(file))
    loaded = step("loaded", lambda: Calibration.load(file))
    found = step("searched", loaded.search_thresholds)
    page = step("reported", lambda: render_html(describe(loaded)))
    assert len(found) == len(loaded.histograms) == number
    assert repr(found) == repr(made.thresholds)
    print(json.dumps({"steps": steps, "file": file.stat().st_size / 2**20, "page": len(page) / 2**20}))  # noqa: T201


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
