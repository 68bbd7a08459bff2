"""The cost of calibration compared with running the model: both passes against two plain forward passes.

Run it by
``pytest tests/tools/bench/bench_calibration.py -o python_files='bench_*.py' --benchmark-quiet``.
It takes some minutes. Passes and plain runs alternate on all cores, in wall-clock time. By default pass 2 counts what
pass 1 kept; with ``keep_bytes=0`` both passes run the model. The histograms are first checked against NumPy's. With a
GPU the same rows are measured on it too.
"""

import importlib.util
import os
import statistics
import time
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from klquant.backends.collection.kept import KEEP_BYTES
from klquant.backends.torch import Quantizer
from klquant.backends.torch.model.forward import call_model
from support.digits_networks import InvertedResidual, ResidualBlock
from tools.bench.peers import machine
from tools.bench.peers.table import Report

ROUNDS, NUM_BATCHES = 5, 2
BATCH = {"cpu": 8, "cuda": 64}
GPU_BAR = 1.5
KEPT = (0, KEEP_BYTES, 2 * KEEP_BYTES)  # of ONNX models
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

if importlib.util.find_spec("pytest_benchmark"):  # this file is imported without it too, and the mark is unknown then
    pytestmark = pytest.mark.benchmark(timer=time.perf_counter)
else:
    pytestmark = pytest.mark.skip(reason="needs pytest-benchmark")


def resnet18():
    """Return a network with the size and layers of ResNet-18."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    widths = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1)]
    blocks = [ResidualBlock(*width) for width in [*widths, (256, 512, 2), (512, 512, 1)]]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def vgg11():
    """Return the convolutions of VGG-11."""
    layers, inputs = [], 3
    for outputs in (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"):
        if outputs == "pool":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True)]
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def mobilenet():
    """Return inverted residuals as wide as those of MobileNetV2, which compute little for the data they read."""
    widths = [(32, 16, 1), (16, 24, 2), (24, 24, 1), (24, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 96, 1)]
    blocks = [InvertedResidual(*width, expansion=6) for width in widths]
    stem = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6(inplace=True)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 1000))


class Encoder(nn.Module):
    """A transformer encoder as wide as BERT-base: four layers with its linear layers and attention."""

    def __init__(self):
        super().__init__()
        parts = {"qkv": (768, 2304), "out": (768, 768), "up": (768, 3072), "down": (3072, 768)}
        layers = ({name: nn.Linear(*shape) for name, shape in parts.items()} for _ in range(4))
        self.layers = nn.ModuleList(nn.ModuleDict(layer) for layer in layers)

    def forward(self, x):
        for layer in self.layers:
            heads = layer["qkv"](x).unflatten(-1, (3, 12, 64)).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
            x = nn.functional.layer_norm(x + layer["out"](mixed), (768,))
            x = nn.functional.layer_norm(x + layer["down"](nn.functional.gelu(layer["up"](x))), (768,))
        return x


MODELS = {
    "ResNet-18, 224 x 224": (resnet18, (3, 224, 224), 1.15),
    "VGG-11 without its large linear layers, 224 x 224": (vgg11, (3, 224, 224), None),
    "MobileNetV2-like, 224 x 224": (mobilenet, (3, 224, 224), 1.4),
    "BERT-base-like, 4 layers, 128 tokens": (Encoder, (128, 768), 1.15),
}


@pytest.fixture(scope="module")
def report(request):
    provenance = {**machine.provenance(cores=f"{torch.get_num_threads()} threads of {os.cpu_count()}")}
    provenance["torch"] = torch.__version__
    if torch.cuda.is_available():
        provenance["GPU"] = torch.cuda.get_device_name()
    table = Report(provenance, title="calibration", clock="wall ms")
    request.config.pluginmanager.register(table)
    return table


def seconds(function, device):
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def assert_counts_are_right(quantizer, histograms, batches):
    """Compare the first layer's histogram with NumPy's histogram of the data."""
    x = np.concatenate([batch.cpu().numpy().ravel() for batch in batches])
    hist, edges = next(iter(histograms.values()))
    assert hist.sum() == x.size
    expected = np.histogram(x, bins=edges)[0]
    assert np.abs(np.cumsum(hist - expected)).max() <= 4  # NumPy counts values on an edge on one side only


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_two_passes(report, benchmark, name, device):
    build, shape, cpu_bar = MODELS[name]
    torch.manual_seed(0)
    model = build().eval().to(device)
    batches = [torch.randn(BATCH[device], *shape, device=device) for _ in range(NUM_BATCHES)]

    @torch.no_grad()
    def plain():
        for batch in batches * 2:
            call_model(model, batch)

    keeping, running_twice = (passes_of(model, batches, keep_bytes) for keep_bytes in (KEEP_BYTES, 0))
    plain()
    rounds = [[seconds(function, device) for function in (plain, keeping, running_twice)] for _ in range(ROUNDS)]
    running, *calibrating = (list(column) for column in zip(*rounds, strict=True))
    report.add(f"two plain passes on {device}: {name}", running)
    limit = cpu_bar if device == "cpu" else GPU_BAR
    bar = None if limit is None else ("<=", limit)
    for what, times in zip(("", ", keep_bytes=0"), calibrating, strict=True):
        ratio = statistics.median(times) / statistics.median(running)
        report.add(f"both passes on {device}: {name}{what}", times, ratio, "x plain", None if what else bar)
    benchmark.pedantic(lambda: None, rounds=1)


def passes_of(model, batches, keep_bytes):
    """Return a function that makes both passes, after a check of what it finds."""
    quantizer = Quantizer(model, progress=False, keep_bytes=keep_bytes)
    quantizer.fold(batches[0])
    quantizer.quantize_weights()

    def passes():
        quantizer.collect_amax(batches)
        return quantizer.collect_histograms(batches)

    assert_counts_are_right(quantizer, passes(), batches)
    return passes


@pytest.mark.filterwarnings("ignore")  # of the exporter
def test_onnx(report, benchmark, tmp_path):
    """All of a calibration, with loading the model and the search, compared with one pass of onnxruntime."""
    onnxruntime, onnx_backend = pytest.importorskip("onnxruntime"), importlib.import_module("klquant.backends.onnx")
    torch.manual_seed(0)
    path, shape = str(tmp_path / "model.onnx"), (BATCH["cpu"], 3, 224, 224)
    torch.onnx.export(resnet18().eval(), (torch.randn(shape),), path, input_names=["x"], dynamo=True, verbose=False)
    batches = [{"x": np.random.default_rng(k).normal(size=shape).astype(np.float32)} for k in range(12)]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def plain():
        for batch in batches:
            session.run(None, batch)

    def calibrate(keep_bytes):
        onnx_backend.calibrate(path, batches, progress=False, keep_bytes=keep_bytes)

    plain()
    rounds = [[seconds(plain, "cpu"), *(seconds(partial(calibrate, n), "cpu") for n in KEPT)] for _ in range(3)]
    running, *calibrating = (list(column) for column in zip(*rounds, strict=True))
    report.add("one plain pass of onnxruntime: ResNet-18, 224 x 224", running)
    for keep_bytes, times in zip(KEPT, calibrating, strict=True):
        ratio = statistics.median(times) / statistics.median(running)
        bar = ("<=", 3) if keep_bytes == KEEP_BYTES else None
        report.add(f"calibration of the ONNX model, keep_bytes={keep_bytes}", times, ratio, "x plain", bar)
    benchmark.pedantic(lambda: None, rounds=1)
