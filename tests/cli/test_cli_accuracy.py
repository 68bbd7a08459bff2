"""``klquant tune`` and ``klquant compare``: the same as in Python, with data and labels from files."""

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from klquant.backends.onnx import compare, inspect
from klquant.cli import cli
from klquant.cli.labels import open_labels
from klquant.errors import InvalidInputError
from support.onnx_models import build

RNG = np.random.default_rng(0)
MODEL = build("float[n, 3, 8, 8] x", "float[n, 4] y",
              "a = Conv <pads = [1, 1, 1, 1]> (x, w1) r = Relu (a) c = Conv (r, w2) p = GlobalAveragePool (c) "
              "y = Flatten (p)", w1=(4, 3, 3, 3), w2=(4, 4, 3, 3))  # fmt: skip
X = RNG.normal(size=(40, 3, 8, 8)).astype(np.float32)


def run(*arguments, code=0):
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.stderr
    return result.stdout


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    onnx.save(MODEL, "float.onnx")
    np.save("data.npy", X)
    (tmp_path / "task_of_mine.py").write_text("def metric(floats, others):\n    return len(floats) / 10\n")
    return tmp_path


def tuned(*more, code=0):
    options = ("--data", "data.npy", "--engine", "onnxruntime", "-o", "int8.onnx")
    return run("tune", "float.onnx", *options, *more, code=code)


def test_tune_writes_the_model_and_prints_the_trade(here):
    text = tuned("--target", "20dB", "--calibration", "calib.npz", "--resume", "trials.json")
    assert "* criterion" in text
    assert "target 20dB reached" in text
    settings = json.loads(text.partition("settings: ")[2].splitlines()[0])
    run("quantize", "float.onnx", "calib.npz", "--engine", "onnxruntime", "-o", "again.onnx")
    assert (here / "again.onnx").read_bytes() == (here / "int8.onnx").read_bytes()
    assert settings["exclude"] == []
    assert len(json.loads((here / "trials.json").read_text())["trials"]) == text.count("x 0.") + text.count("x 1.") - 1
    assert all(node.int8 for node in inspect("int8.onnx", "onnxruntime") if node.op_type == "Conv")


def test_tune_saves_the_float_model_that_its_calibration_fits(here):
    w1, w2 = (onnx.numpy_helper.to_array(tensor).copy() for tensor in MODEL.graph.initializer)
    factors = np.float32(10) ** RNG.uniform(-2, 2, size=4).astype(np.float32)
    w1, w2 = w1 * factors[:, None, None, None], w2 / factors[None, :, None, None]
    uneven = onnx.ModelProto.FromString(MODEL.SerializeToString())
    for tensor, array in zip(uneven.graph.initializer, (w1, w2), strict=True):
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(uneven, "float.onnx")  # channels that only equalization can quantize
    text = tuned("--target", "30dB", "--calibration", "calib.npz")
    assert "wrote int8.onnx, calib.npz, calib_equalize.onnx" in text
    run("quantize", "calib_equalize.onnx", "calib.npz", "--engine", "onnxruntime", "-o", "again.onnx")
    assert (here / "again.onnx").read_bytes() == (here / "int8.onnx").read_bytes()
    run("quantize", "float.onnx", "calib.npz", "--engine", "onnxruntime", "-o", "other.onnx", code=2)


def test_a_target_out_of_reach_is_exit_code_1_and_the_best_model(here):
    found = json.loads(tuned("--target", "150dB", "--max-runs", "3", "--json", code=1))
    assert not found["reached"]
    assert len(found["trials"]) == 3
    assert (here / "int8.onnx").exists()


def test_tune_takes_a_metric_and_other_data_to_measure_on(here):
    np.save("other.npy", X[:16])
    options = ("--metric", "task_of_mine:metric", "--target", "0.2", "--validation", "other.npy", "--json")
    found = json.loads(tuned(*options))
    assert [trial["metric"] for trial in found["trials"]] == [0.2]  # two batches of eight


def test_compare_prints_what_compare_returns(here):
    tuned()
    labels = RNG.integers(0, 4, size=40)
    np.savez("labels.npz", labels=labels)
    arguments = ("compare", "float.onnx", "int8.onnx", "--data", "data.npy")
    found = json.loads(run(*arguments, "--labels", "labels.npz", "--metric", "task_of_mine:metric", "--json"))
    expected = compare("float.onnx", "int8.onnx", [X], engine="onnxruntime", labels=labels)
    assert found["outputs"][0] == pytest.approx(expected.outputs[0]._asdict())
    assert found["metric"] == 0.5
    assert found["int8_bytes"] == (here / "int8.onnx").stat().st_size
    text = run(*arguments)
    assert "SQNR dB" in text
    assert f"SQNR {expected.sqnr_db:.1f} dB" in text


def test_compare_takes_the_labels_of_the_samples_it_takes(here):
    tuned()
    labels = RNG.integers(0, 4, size=40)
    np.save("labels.npy", labels)
    arguments = ("compare", "float.onnx", "int8.onnx", "--data", "data.npy", "--labels", "labels.npy", "--json")
    found = json.loads(run(*arguments, "--max-samples", "10"))["outputs"][0]
    expected = compare("float.onnx", "int8.onnx", [X[::4]], engine="onnxruntime", labels=labels[::4])
    assert found == pytest.approx(expected.outputs[0]._asdict())
    np.save("labels.npy", labels[:39])
    arguments = (*arguments, "--max-samples", "10")
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert "`--labels` must have one label for each of 40 samples, got 39" in result.stderr


def test_labels_are_the_folders_of_images(tmp_path):
    for name in ("b/2.png", "a/1.png", "b/1.jpg", "c/x/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert open_labels("folders", str(tmp_path)).tolist() == [0, 1, 1, 2]
    (tmp_path / "4.png").touch()
    with pytest.raises(InvalidInputError, match="one folder for each class"):
        open_labels("folders", str(tmp_path))


def test_labels_of_files(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(3))
    np.savez(tmp_path / "b.npz", images=np.zeros(3), labels=np.arange(3))
    for name in ("a.npy", "b.npz"):
        assert open_labels(str(tmp_path / name), "").tolist() == [0, 1, 2]
    with pytest.raises(InvalidInputError, match=r"`--labels` must be `folders` or .* got 'none'"):
        open_labels("none", "")


@pytest.mark.parametrize("metric", ["task_of_mine", "task_of_mine:nothing", "no_such_module:metric"])
def test_a_metric_that_is_missing_is_refused(here, metric):
    result = CliRunner().invoke(cli, ["compare", "float.onnx", "float.onnx", "--data", "data.npy", "--metric", metric])
    assert result.exit_code == 2
    assert "--metric" in result.stderr
