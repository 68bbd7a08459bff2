"""A model is prepared, and its graph is read, at most once in a call."""

import sys
import warnings
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner

from klquant.backends import torch as torch_backend
from klquant.backends.formats import write_table
from klquant.backends.onnx import calibrate, prepare, quantize
from klquant.backends.onnx.model import graph
from klquant.cli import cli
from klquant.errors import CalibrationWarning
from support.networks import batch, mlp
from support.onnx_models import build

X = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
THRESHOLDS = {"x": 3.0, "r": 2.0}
MODEL = build("float[n, 4] x", "float[n, 3] y", "a = MatMul(x, w) r = Relu(a) y = MatMul(r, v)", w=(4, 4), v=(4, 3))


@pytest.fixture
def counts(monkeypatch):
    """Return the number of preparations, and how often each model was read, while the test runs."""
    found, session, read = Counter(), onnxruntime.InferenceSession, graph.read_graph

    def new_session(path, options, **more):
        found["prepared"] += bool(options.optimized_model_filepath)
        return session(path, options, **more)

    def new_read(model):
        found[model.SerializeToString()] += 1
        return read(model)

    monkeypatch.setattr(onnxruntime, "InferenceSession", new_session)
    for module in list(sys.modules.values()):
        if getattr(module, "read_graph", None) is read:
            monkeypatch.setattr(module, "read_graph", new_read)
    return found


@pytest.fixture
def folder(tmp_path):
    """A folder with a model, data, a calibration and a table of thresholds."""
    onnx.save(MODEL, tmp_path / "model.onnx")
    np.save(tmp_path / "x.npy", X)
    calibrate(MODEL, [X], criterion="max").save(tmp_path / "calibration.npz")
    write_table(tmp_path / "table.csv", THRESHOLDS)
    return tmp_path


def command(name, *arguments):
    def run(folder):
        paths = [str(folder / one) if "." in one else one for one in (*arguments, "-o", "out.file")]
        result = CliRunner().invoke(cli, [name, *paths], catch_exceptions=False)
        assert result.exit_code == 0, result.stderr

    return run


def export(folder):
    example = batch(5, 4, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # of a random network
        model = torch_backend.quantize(mlp(), [example], num_bins=255).model
        torch_backend.export_onnx(model, example, engine="onnxruntime", batches=[example])


@pytest.mark.parametrize(
    "call",
    [
        lambda folder: calibrate(folder / "model.onnx", [X], criterion="max"),
        lambda folder: quantize(folder / "model.onnx", THRESHOLDS),
        command("calibrate", "model.onnx", "--data", "x.npy", "--criterion", "max"),
        command("quantize", "model.onnx", "calibration.npz"),
        command("cache-to-qdq", "model.onnx", "table.csv"),
        export,
    ],
    ids=["calibrate", "quantize", "cli-calibrate", "cli-quantize", "cli-cache-to-qdq", "export_onnx"],
)
def test_a_call_prepares_once_and_reads_no_graph_twice(folder, counts, call):
    call(folder)
    assert counts.pop("prepared") == 1
    assert set(counts.values()) == {1}


def test_a_prepared_model_is_used_as_it_is_and_not_changed(counts):
    prepared = prepare(MODEL)
    before = prepared.model.SerializeToString()
    assert prepare(prepared) is prepared
    calibration = calibrate(prepared, [X], criterion="max")
    first, second = (quantize(one, calibration, engine="onnxruntime").model for one in (prepared, MODEL))
    assert prepared.model.SerializeToString() == before
    assert first.SerializeToString() == second.SerializeToString()
    assert counts["prepared"] == 2
