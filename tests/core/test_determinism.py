"""Every environment gives the numbers in this file, with every version of every library.

`.ci/run` runs it with the lowest versions that pyproject.toml allows, and with the newest.
"""

import hashlib

import numpy as np
import pytest

import klquant
from support.namespaces import import_torch

# A Weyl sequence with long tails: no random generator, and no function whose last bits differ between libraries.
STEPS = np.arange(200_003, dtype=np.int64) * 2654435761 % 2**32 - 2**31
X = ((STEPS / 2.0**31) ** 5).astype(np.float32) * 8
AMAX = float(np.abs(X).max())
COUNTS = {255: "8069339b47a938b7", 2001: "12182a7f0c545bd6", 8001: "e62af8eddbc0c4b4"}
IN_PASSES = {1: "d629e7cc88b439fe", 2: COUNTS[2001]}
THRESHOLDS = {
    "optimal": "0x1.fe76fb02afc8cp+2",
    "max": "0x1.0000000000000p+3",
    "percentile": "0x1.ffbe7eeab8dd4p+2",
    "mse": "0x1.fc6af45b9a29bp+2",
}


def digest(counts):
    return hashlib.sha256(np.asarray(counts).astype("<i8").tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("num_bins", COUNTS)
def test_counts_are_the_same_in_every_environment(xp, num_bins):
    hist, _ = xp.call(klquant.histogram, xp.asarray(X), num_bins=num_bins, amax=AMAX)
    assert digest(hist) == COUNTS[num_bins]


@pytest.mark.parametrize("criterion", THRESHOLDS)
def test_thresholds_are_the_same_in_every_environment(xp, criterion):
    hist, edges = klquant.histogram(X, num_bins=2001, amax=AMAX)
    found = xp.call(getattr(klquant, f"{criterion}_threshold"), xp.asarray(hist), xp.asarray(edges))
    assert float(found).hex() == THRESHOLDS[criterion]


@pytest.mark.parametrize("passes", IN_PASSES)
def test_torch_counts_are_the_same_in_every_environment(passes):
    torch = import_torch()
    from klquant.backends.torch import quantize

    batches = [torch.from_numpy(X[k::3, None].copy()) for k in range(3)]
    result = quantize(torch.nn.Sequential(torch.nn.Linear(1, 1)).eval(), batches, num_bins=2001, passes=passes)
    ((_, histogram),) = result.histograms.items()
    assert digest(histogram.hist) == IN_PASSES[passes]


def test_onnxruntime_counts_are_the_same_in_every_environment():
    pytest.importorskip("onnxruntime")
    from klquant.backends.onnx import calibrate
    from support.onnx_models import build

    model = build("float[n, 1] x", "float[n, 1] y", "y = MatMul(x, w)", w=np.ones((1, 1), np.float32))
    histogram = calibrate(model, [X[k::3, None].copy() for k in range(3)], num_bins=2001).histograms["x"]
    assert digest(histogram.hist) == COUNTS[2001]
