"""``klquant demo`` on real images: accuracy, files and errors."""

import json
import sys

import pytest
import torch
from click.testing import CliRunner

from klquant import InvalidInputError
from klquant.backends.files import write_atomic
from klquant.backends.torch import Calibration
from klquant.cli import cli
from klquant.demo.digits import NUM_TEST, WEIGHTS, digits_vgg, load_images, load_network
from klquant.demo.run import NUM_CALIBRATION, run_demo, summarize
from klquant.demo.sample import NUM_PHOTOS, write_sample
from klquant.demo.training import save_weights, train


@pytest.fixture(scope="module")
def digits():
    return load_images()


@pytest.fixture(scope="module", params=["inputs", "outputs"])
def result(request, digits):
    return run_demo(load_network(), digits, observe=request.param)


def test_the_split_is_fixed_and_disjoint(digits):
    assert [len(part) for part in digits] == [1197, 1197, NUM_TEST, NUM_TEST]
    again = load_images()
    assert all(torch.equal(a, b) for a, b in zip(digits, again, strict=True))
    assert len(digits.train_images) >= NUM_CALIBRATION
    assert set(digits.test_labels.bincount().tolist()) <= {58, 59, 60, 61}


def test_the_shipped_weights_are_small_and_trained(digits):
    assert WEIGHTS.stat().st_size < 1_000_000
    with torch.no_grad():
        top1 = (load_network()(digits.test_images).argmax(1) == digits.test_labels).double().mean()
    assert top1 > 0.99


def test_int8_is_within_four_tenths_of_a_point_of_fp32(result):
    fp32 = result.accuracy["FP32"].top1
    for version in ("INT8 KL", "INT8 max"):
        assert abs(result.accuracy[version].top1 - fp32) <= 0.4
        assert result.accuracy[version].sqnr_db > 25


def test_every_layer_is_calibrated(result):
    assert list(result.layers) == [
        "features.0",
        "features.3",
        "features.7",
        "features.10",
        "classifier.1",
        "classifier.3",
    ]
    for layer in result.layers.values():
        assert 0 < layer.threshold <= layer.amax
        assert layer.divergence >= 0
    assert len(summarize(result)) == 6


def test_the_command_writes_report_and_pictures(tmp_path):
    out = tmp_path / "out"
    run = CliRunner().invoke(cli, ["demo", "--out", str(out)], catch_exceptions=False)
    assert run.exit_code == 0
    assert "INT8 KL" in run.output
    assert "features.10" in run.output
    assert "features.11  │ batch_norm │ features.10" in run.output
    report = json.loads((out / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["accuracy"]["INT8 KL"]["top1"] > 99
    assert {fold["into"] for fold in report["folds"] if not fold["reason"]} == set(report["layers"]) - {"classifier.3"}
    assert {layer["name"] for layer in report["diagnosis"]["layers"]} == set(report["layers"])
    assert list(Calibration.load(out / "calibration.npz").thresholds) == list(report["layers"])
    pictures = sorted(path.name for path in out.glob("*.png"))
    assert pictures == sorted(f"{name}.png" for name in report["layers"])
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_the_command_prints_json_alone(tmp_path):
    run = CliRunner().invoke(cli, ["demo", "--json", "--out", str(tmp_path)], catch_exceptions=False)
    assert json.loads(run.stdout)["observe"] == "inputs"


def test_training_writes_weights_that_load(digits, tmp_path):
    save_weights(train(digits, epochs=1), tmp_path / "weights.safetensors")
    network = load_network(tmp_path / "weights.safetensors")
    assert not network.training
    assert network(digits.test_images[:4]).shape == (4, 10)


def test_training_leaves_the_random_state_alone(digits):
    before = torch.get_rng_state()
    train(digits, epochs=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\xff" * 100], ids=["empty", "text", "ones"])
def test_broken_weights_are_a_named_error(tmp_path, content):
    (tmp_path / "weights.safetensors").write_bytes(content)
    with pytest.raises(InvalidInputError, match="must hold the weights of the demo network"):
        load_network(tmp_path / "weights.safetensors")


def test_weights_of_another_network_are_a_named_error(tmp_path):
    other = digits_vgg()
    del other.classifier
    save_weights(other, tmp_path / "weights.safetensors")
    with pytest.raises(InvalidInputError, match="must hold the weights"):
        load_network(tmp_path / "weights.safetensors")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file"
    write_atomic(path, b"first")

    def fails(_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(path.parent.iterdir()) == [path]


def test_a_missing_library_is_one_line_with_the_remedy(monkeypatch):
    monkeypatch.delitem(sys.modules, "klquant.demo.digits")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    run = CliRunner().invoke(cli, ["demo"])
    assert run.exit_code == 2
    assert "Traceback" not in run.output
    assert "pip install 'klquant[demo]'" in run.output


def test_the_sample_is_a_model_and_pictures_that_fit(tmp_path, digits):
    pytest.importorskip("onnxscript", reason="needs torch.onnx")
    from klquant.backends.onnx import compare
    from klquant.cli.data import Amount, open_batches
    from klquant.cli.images import ImageOptions
    from klquant.cli.labels import open_labels

    model, photos, test = write_sample(tmp_path)
    options = ImageOptions((8, 8), channels="L", layout="NCHW")
    assert sum(map(len, open_batches(str(photos), images=options))) == NUM_PHOTOS
    batches, labels = open_batches(str(test), Amount(50), images=options), open_labels("folders", str(test))
    found = compare(str(model), str(model), batches, engine="onnxruntime", labels=labels)
    assert found.outputs[0].float_accuracy > 0.98


def test_the_command_writes_the_sample(tmp_path, monkeypatch):
    monkeypatch.setattr("klquant.demo.sample.write_sample", lambda folder: [folder / name for name in "abc"])
    result = CliRunner().invoke(cli, ["demo", "--sample", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1].startswith(f"next: klquant auto {tmp_path / 'a'} --data {tmp_path / 'b'} ")
