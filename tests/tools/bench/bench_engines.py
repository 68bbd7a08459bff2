"""How fast INT8 is in the engines, beside the FP32 model in the same engine, on one thread.

Run it by
``pytest tests/tools/bench/bench_engines.py -o python_files='bench_*.py'``.
It takes about a minute. Before anything is timed, every Conv and Gemm of klquant's models must be executed in INT8,
and the test images be classified as well as in FP32, within 0.4 points. The batch size is free in all models. All
that a ratio compares is timed by turns, by the wall clock; what loses stays, marked LOSES. Rows of peers, and of
OpenVINO in the precision that it takes for FP32 models if it may choose (bfloat16, where the CPU has that), are for
information. With ``KLQUANT_BENCH_JSON=path`` the table is also written there.
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
ENGINES = ("openvino", "tensorrt")  # that OpenVINO executes
PEERS = {f"peer, {variant}": variant for variant in (quantize_static.DEFAULT, "uint8, per channel")}


class Subject(NamedTuple):
    """A model, and data that it is calibrated with and judged by."""

    model: onnx.ModelProto
    batches: list[np.ndarray]
    images: np.ndarray
    labels: np.ndarray | None
    """None for a network that was not trained: its logits are compared."""


class Group(NamedTuple):
    """Models that are timed by turns in one engine, the FP32 model among them."""

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
    """Return a network of the size of ResNet-18."""
    torch.manual_seed(0)
    names = {"input_names": ["images"], "output_names": ["logits"], "dynamic_shapes": ({0: torch.export.Dim("batch")},)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns of deprecations of its own
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
    """Return what is timed, by label."""
    float_model = subject(network).model
    found = {FP32: float_model}
    for engine in group.engines:
        found[f"INT8 for {engine}"] = quantize(float_model, calibration(network), engine=engine).model
    return found | {peer: peer_model(network, PEERS[peer]) for peer in group.peers}


def peer_model(network, variant):
    """Return what onnxruntime's quantize_static makes by MinMax."""
    model, batches, *_ = subject(network)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("float.onnx", "quantized.onnx")]
        quantize_static.preprocess(model, paths[0])
        quantize_static.quantize_at_once(*paths, model.graph.input[0].name, batches, variant)
        return onnx.load(paths[1])


def by_turns(functions):
    """Return the seconds of many calls of each function, which take turns of some calls each."""
    calls = max(1, round(TURN_SECONDS / min(clocked(functions[0], 10))))
    turns = [[clocked(function, calls) for function in functions] for _ in range(TURNS)]
    return [list(itertools.chain(*parts)) for parts in zip(*turns, strict=True)]


def clocked(function, calls):
    """Time single calls, so that few of them meet another process."""
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
