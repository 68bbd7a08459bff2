"""Calibration of ONNX models by klquant and by onnxruntime: accuracy, cost, and agreement.

Run it by
``pytest tests/tools/bench/bench_peers.py -o python_files='bench_*.py'``.
It takes about two minutes. Each calibration has its own process, on one core, and alternates there with plain runs of
the FP32 model over the same images. INT8 models are scored in onnxruntime, with all optimizations. klquant's models
must be as accurate as FP32, within 0.4 points, and klquant must find the same ranges as MinMax.
``KLQUANT_BENCH_JSON=path`` writes the table to that file too.

Every method of onnxruntime has two rows: the default, and the better of two variants from its documentation. These
are UINT8 for CPUs like this one, and symmetric INT8 for GPUs, both with a scale per output channel. The columns are the
MiB by which the calibration raised the peak memory; the number of layers with weights that run in INT8, and of others;
and shares of the tensors that both models have, in percent: T equal to amax, T equal to klquant's with the same
criterion, quantizers with the same scale, zero point and type, and weights with the same integer.
"""

import warnings
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest

from klquant import CalibrationWarning
from klquant.backends.onnx import Calibration, calibrate, quantize
from support import digits_networks, onnx_networks
from support.calibration_job import Job, measure
from tools.bench.peers import agreement, engines, machine, quantize_static
from tools.bench.peers.score import Score, score
from tools.bench.peers.table import collected

SAME = {  # the same criterion in klquant
    "MinMax": {"criterion": "max"},
    "Entropy": {"criterion": "entropy"},
    "Entropy, 2001 bins, 255 levels": {"criterion": "entropy", "num_bins": 2001},
    "Percentile": {"criterion": "percentile", "overrides": {"*": {"percentile": 99.999}}},
}
ROUNDS, SLOW = 3, "Entropy, 2001 bins, 255 levels"  # timed once only


class Setting(NamedTuple):
    """A network as a file, and data to score its INT8 models."""

    network: str
    job: Job
    """A job without its method."""
    model: onnx.ModelProto
    batches: list[np.ndarray]
    images: np.ndarray
    labels: np.ndarray
    expected: np.ndarray
    """The logits of FP32."""
    of_float: Score
    amax: dict[str, float]
    """amax by tensor, as klquant finds it."""


@pytest.fixture(scope="module")
def report(request):
    versions = {name: metadata.version(name) for name in ("onnx", "onnxruntime")}
    with machine.one_core() as how:
        provenance = {**machine.provenance(cores=how), **versions}
        with collected(request.config.pluginmanager, provenance, title="calibration of ONNX models") as report:
            yield report


@pytest.fixture(scope="module", params=digits_networks.NETWORKS[:3])
def setting(report, request, tmp_path_factory):
    batches, images, labels = onnx_networks.digits()
    folder = tmp_path_factory.mktemp("peers")
    path, data = folder / "float.onnx", folder / "images.npy"
    quantize_static.preprocess(onnx_networks.load(request.param), path)
    np.save(data, np.concatenate(batches))
    job = Job("", str(path), str(data), str(folder / "found.npz"), rounds=ROUNDS)
    expected = engines.in_onnxruntime(onnx.load(path)).run(images)
    of_float = score(expected, expected, labels)
    amax = calibrate(path, batches, criterion="max").amax
    report.add(f"{request.param}: FP32", figures=of_float.figures())
    return Setting(request.param, job, onnx.load(path), batches, images, labels, expected, of_float, amax)


class Result(NamedTuple):
    """An INT8 model in onnxruntime."""

    model: onnx.ModelProto
    score: Score
    layers: str


def judged(setting, model):
    engine = engines.in_onnxruntime(model)
    return Result(model, score(engine.run(setting.images), setting.expected, setting.labels), engine.layers())


def add_row(report, setting, label, cost, result, **figures):
    own = {**result.score.figures(), "MiB": f"{cost.extra_mib:.0f}", "layers run in": result.layers}
    shares = {name.replace("_", "="): f"{share:.0f}" for name, share in figures.items()}
    report.add(f"{setting.network}: {label}", cost.calibrating, cost.ratio, "x forward", figures={**own, **shares})


def thresholds_of(calibration):
    return {name: layer.threshold for name, layer in calibration.thresholds.items()}


@pytest.mark.parametrize("criterion", ["entropy", "mse", "max"])
def test_klquant(report, setting, criterion):
    cost = measure(setting.job._replace(method=criterion))
    calibration = Calibration.load(setting.job.result)
    result = judged(setting, quantize(setting.model, calibration, engine="onnxruntime").model)
    assert result.score.is_near(setting.of_float)
    share = agreement.of_thresholds(thresholds_of(calibration), setting.amax)
    assert criterion != "max" or share == 100
    add_row(report, setting, f"klquant, {criterion}", cost, result, T_amax=share)


@pytest.mark.parametrize("method", quantize_static.METHODS)
def test_onnxruntime(report, setting, method):
    cost = measure(setting.job._replace(method=method, rounds=1 if method == SLOW else ROUNDS))
    found = quantize_static.thresholds(setting.job.result)
    thresholds, model = by_same_criterion(setting, method)
    shares = {
        "T_amax": agreement.of_thresholds(found, setting.amax),
        "T_ours": agreement.of_thresholds(found, thresholds),
    }
    assert method != "MinMax" or shares["T_ours"] == 100
    results = {variant: judged(setting, peer_model(setting, method, variant)) for variant in quantize_static.VARIANTS}
    advised = max(results.keys() - {quantize_static.DEFAULT}, key=lambda variant: results[variant].score.sqnr_db)
    for variant in (quantize_static.DEFAULT, advised):
        shares["grids_ours"] = agreement.of_grids(results[variant].model, model)
        shares["weights_ours"] = agreement.of_weights(results[variant].model, model)
        add_row(report, setting, f"{method}; {variant}", cost, results[variant], **shares)


def by_same_criterion(setting, method):
    """Return klquant's thresholds by tensor, and its model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        calibration = calibrate(setting.model, setting.batches, **SAME[method])
    return thresholds_of(calibration), quantize(setting.model, calibration, engine="onnxruntime").model


def peer_model(setting, method, variant):
    target = Path(setting.job.result).with_suffix(".onnx")
    quantize_static.quantize(setting.job.model, setting.job.result, method, variant, target)
    return onnx.load(target)


def test_ranges_from_a_file_make_the_model_that_quantize_static_makes_alone(setting):
    """Let a calibration be timed alone, and be used for all variants."""
    measure(setting.job._replace(method="MinMax", rounds=1))
    for variant in quantize_static.VARIANTS:
        target = Path(setting.job.result).with_name("alone.onnx")
        quantize_static.quantize_at_once(setting.job.model, target, "images", setting.batches, variant)
        alone, found = (judged(setting, model) for model in (onnx.load(target), peer_model(setting, "MinMax", variant)))
        assert alone.score == found.score
