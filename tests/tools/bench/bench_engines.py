"""The speed of INT8 models in the engines, compared with the FP32 model in the same engine, on one thread.

Run it by
``pytest tests/tools/bench/bench_engines.py -o python_files='bench_*.py'``.
It takes about a minute. First it checks that every Conv and Gemm of klquant's models runs in INT8, and that the test
images are classified as well as in FP32, within 0.4 points. The batch size is free in all models. The two sides of a
ratio alternate, in wall-clock time. A ratio that misses its bar stays in the table, marked LOSES. There are two kinds
of rows for information: peers, and OpenVINO with its default precision for FP32 models (bfloat16, if the CPU has it).
``KLQUANT_BENCH_JSON=path`` writes the table to that file too.
"""

import functools
import itertools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
import torch

from klquant import CalibrationWarning
from klquant.backends.onnx import calibrate, inspect, quantize
from support import digits_networks, onnx_networks
from tools.bench.bench_calibration import resnet18
from tools.bench.peers import engines, machine, quantize_static
from tools.bench.peers.score import score
from tools.bench.peers.table import collected

LARGE = "ResNet-18 at 224"
CASES = [*itertools.product(digits_networks.NETWORKS[:3], (1, 64)), (LARGE, 1)]
TURNS, TURN_SECONDS = 41, 0.01
FP32 = "FP32"
ENGINES = ("openvino", "tensorrt")  # models for these engines run in OpenVINO
PEERS = {f"peer, {variant}": variant for variant in (quantize_static.DEFAULT, "uint8, per channel")}


class Subject(NamedTuple):
    """A model, with data to calibrate it and to score it."""

    model: onnx.ModelProto
    batches: list[np.ndarray]
    images: np.ndarray
    labels: np.ndarray | None
    """None for an untrained network, of which the logits are compared."""


class Group(NamedTuple):
    """Models that alternate in one engine, including the FP32 model."""

    engine: str
    load: Callable[..., engines.Engine]
    engines: tuple[str, ...]
    peers: tuple[str, ...] = ()
    wanted: tuple[str, float] | None = ("<=", 1.0)


GROUPS = {
    "onnxruntime": Group("onnxruntime", engines.in_onnxruntime, ("onnxruntime",), tuple(PEERS)),
    "OpenVINO, f32": Group("openvino", functools.partial(engines.in_openvino, precision="f32"), ENGINES),
    "OpenVINO": Group("openvino", functools.partial(engines.in_openvino, precision=None), ENGINES, wanted=None),
}


@pytest.fixture(scope="module")
def report(request):
    versions = {name: metadata.version(name) for name in ("onnx", "onnxruntime", "openvino")}
    with machine.one_core() as how:
        provenance = {**machine.provenance(cores=how), **versions}
        with collected(request.config.pluginmanager, provenance, title="engines", clock="wall ms") as report:
            yield report


@functools.cache
def subject(network):
    if network != LARGE:
        return Subject(onnx_networks.load(network), *onnx_networks.digits())
    images = np.random.default_rng(0).normal(size=(12, 3, 224, 224)).astype(np.float32)
    return Subject(untrained(images), [images[:4], images[4:8]], images[8:], None)


def untrained(images):
    """Return a network as large as ResNet-18."""
    torch.manual_seed(0)
    names = {"input_names": ["images"], "output_names": ["logits"], "dynamic_shapes": ({0: torch.export.Dim("batch")},)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about deprecations inside torch's exporter
        example = torch.from_numpy(images[:2])
        program = torch.onnx.export(resnet18().eval(), (example,), dynamo=True, verbose=False, **names)
    return program.model_proto


@functools.cache
def calibration(network):
    model, batches, *_ = subject(network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        return calibrate(model, batches)


def models(network, group):
    """Return the functions to time, by label."""
    float_model = subject(network).model
    found = {FP32: float_model}
    for engine in group.engines:
        found[f"INT8 for {engine}"] = quantize(float_model, calibration(network), engine=engine).model
    return found | {peer: peer_model(network, PEERS[peer]) for peer in group.peers}


def peer_model(network, variant):
    """Return the model of onnxruntime's quantize_static with MinMax."""
    model, batches, *_ = subject(network)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("float.onnx", "quantized.onnx")]
        quantize_static.preprocess(model, paths[0])
        quantize_static.quantize_at_once(*paths, model.graph.input[0].name, batches, variant)
        return onnx.load(paths[1])


def by_turns(functions):
    """Return the seconds of many calls of each function. The functions take turns, a few calls at a time."""
    calls = max(1, round(TURN_SECONDS / min(clocked(functions[0], 10))))
    turns = [[clocked(function, calls) for function in functions] for _ in range(TURNS)]
    return [list(itertools.chain(*parts)) for parts in zip(*turns, strict=True)]


def clocked(function, calls):
    """Time single calls, so that other processes disturb few of them."""
    times = [time.perf_counter()]
    for _ in range(calls):
        function()
        times.append(time.perf_counter())
    return np.diff(times).tolist()


@pytest.mark.parametrize("engine", GROUPS)
@pytest.mark.parametrize(("network", "batch"), CASES)
def test_int8(report, network, batch, engine):
    group, found = GROUPS[engine], models(network, GROUPS[engine])
    loaded = {label: group.load(model) for label, model in found.items()}
    scores = scores_of(network, loaded)
    for label in (label for label in found if label.startswith("INT8")):
        layers = [node for node in inspect(found[label], group.engine) if node.op_type in ("Conv", "Gemm")]
        assert [node for node in layers if not node.int8] == [], label
        assert loaded[label].precisions == {engines.INT8: len(layers)}, label
        assert scores[label].is_near(scores[FP32]), label
    images = subject(network).images[:batch]
    times = by_turns([functools.partial(each.run, images) for each in loaded.values()])
    for (label, each), seconds in zip(loaded.items(), times, strict=True):
        ratio = statistics.median(seconds) / statistics.median(times[0])
        wanted = group.wanted if label.startswith("INT8") else None
        compared = {"ratio": ratio, "label": "x FP32", "wanted": wanted} if label != FP32 else {}
        figures = {**scores[label].figures(), "layers run in": each.layers()}
        report.add(f"{network}, {batch}, {engine}: {label}", seconds, **compared, figures=figures)


def scores_of(network, loaded):
    _, _, images, labels = subject(network)
    expected = loaded[FP32].run(images)
    return {label: score(each.run(images), expected, labels) for label, each in loaded.items()}
