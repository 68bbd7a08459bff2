"""Activations close to the largest number of their dtype, and results that do not depend on the number of threads."""

# ruff: noqa: E402 - the backends are imported only where their libraries are installed

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from klquant.errors import KLQuantError
from support.namespaces import import_torch

torch = import_torch()
pytest.importorskip("onnxruntime")

from torch import nn

from klquant.backends.onnx import calibrate
from klquant.backends.torch import quantize
from support.onnx_models import build

TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:(layer|tensor) `[^`]*`. (T =|expected SQNR)")
LARGEST = {torch.float16: 65504.0, torch.bfloat16: float(torch.finfo(torch.bfloat16).max)}
CRITERIA = ("entropy", "mse", "percentile", "max")
THREADED = """
import json, sys, numpy as np, torch
sys.path.insert(0, sys.argv[1])
from klquant.backends.onnx import calibrate
from klquant.backends.torch import quantize
from support.networks import eighths, exact
from support.onnx_models import build
from torch import nn
torch.set_num_threads(int(sys.argv[2]))  # OMP_NUM_THREADS alone is lowered where MKL sees one physical core
model = exact(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)))
data = [eighths(64, 1, 8, 8, seed=k) for k in range(3)]
found = [quantize(model, data, criterion=c, num_bins=801).calibration for c in ("entropy", "mse")]
graph = build("float[n, 1, 8, 8] x", "float y", "c = Conv(x, w) y = Relu(c)", w=np.ones((4, 1, 3, 3), np.float32))
found.append(calibrate(graph, [x.numpy() for x in data]))
result = [{n: (t.threshold.hex(), f.histograms[n].hist.tolist()) for n, t in f.thresholds.items()} for f in found]
print(json.dumps([torch.get_num_threads(), result]))
"""


def near_the_end(dtype):
    """Return normally distributed values, scaled so that both extremes are the largest number of the dtype."""
    values = torch.randn(40_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values *= LARGEST[dtype] / values.abs().max()
    values[0, 0], values[1, 1] = LARGEST[dtype], -LARGEST[dtype]
    return values.to(dtype)


def halved(dtype):
    """Return a layer that halves its input, so that its output stays in range."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False)).eval()
    model[0].weight.data = torch.eye(4) / 2
    return model.to(dtype)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(("dtype", "passes"), [(torch.float16, 1), (torch.float16, 2), (torch.bfloat16, 2)])
def test_layers_with_inputs_near_the_largest_number(dtype, criterion, passes):
    x = near_the_end(dtype)
    options = {"criterion": criterion, "num_bins": 801, "passes": passes}
    options["max_amax"] = 3.0**16 if passes == 1 else 1e39
    narrow, wide = quantize(halved(dtype), [x], **options), quantize(halved(torch.float64), [x.double()], **options)
    assert narrow.thresholds["0"].amax == LARGEST[dtype]
    assert repr(narrow.thresholds) == repr(wide.thresholds)  # NaN where the criterion has no divergence
    assert 0 < narrow.thresholds["0"].threshold <= LARGEST[dtype]
    assert narrow.histograms["0"].hist.tolist() == wide.histograms["0"].hist.tolist()
    assert narrow.histograms["0"].hist.sum() == x.numel()
    assert narrow.model(x).isfinite().all()


def test_an_activation_beyond_the_largest_number_names_its_layer():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Identity(), nn.Linear(4, 4)).eval().half()
    model[0].weight.data = torch.eye(4).half() * 2  # 2 * 65504 is infinite
    with pytest.raises(KLQuantError, match=r"`2`.*finite"):
        quantize(model, [near_the_end(torch.float16)], num_bins=801)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_float16_tensors_of_onnx_models_near_the_largest_number(criterion):
    x = near_the_end(torch.float16).numpy()
    weights = {"w": np.eye(4) / 2}
    narrow, wide = (
        build(f"{kind}[n, 4] x", f"{kind} y", "m = MatMul(x, w) y = Relu(m)", w=weights["w"].astype(dtype))
        for kind, dtype in (("float16", np.float16), ("float", np.float32))
    )
    options = {"criterion": criterion, "num_bins": 801}
    found, expected = calibrate(narrow, [x], **options), calibrate(wide, [x.astype(np.float32)], **options)
    assert repr(found.thresholds["x"]) == repr(expected.thresholds["x"])
    assert found.thresholds["x"].amax == 65504.0
    assert found.histograms["x"].hist.tolist() == expected.histograms["x"].hist.tolist()


def test_the_number_of_threads_changes_nothing():
    """The networks compute exactly, because a kernel may sum in a different order with more threads."""
    found = {}
    for threads in (1, 2):
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(
            [sys.executable, "-c", THREADED, str(TESTS), str(threads)],
            env=environment,
            capture_output=True,
            check=True,
        )
        number, found[threads] = json.loads(done.stdout)
        assert number == threads
    assert found[1] == found[2]
    assert all(found[1])
