"""`klquant convert` between tables, and from a calibration."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

import klquant
from klquant.backends.calibration import Calibration
from klquant.backends.formats import FORMATS, read_table, write_table
from klquant.backends.settings import Settings
from klquant.cli import cli

THRESHOLDS = {"conv1_output": (2048 + 0.5) / 2048, "conv2_output": 2.5, "logits": 11.0}


def run(*arguments):
    return CliRunner().invoke(cli, ["convert", *map(str, arguments)], catch_exceptions=False)


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
def test_thresholds_stay_from_any_table_to_any(tmp_path, source, target):
    write_table(tmp_path / "in", THRESHOLDS, format=source)
    result = run(tmp_path / "in", tmp_path / "out", "--from", source, "--to", target)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "wrote 3 thresholds" in result.stdout
    assert read_table(tmp_path / "out", format=target) == pytest.approx(THRESHOLDS, rel=2e-7)


def test_formats_are_detected_from_the_files(tmp_path):
    (tmp_path / "old.txt").write_text(
        "TRT-8601-EntropyCalibration2\nimages: 3c010a14\n(Unnamed Layer* 0) [Conv]: 4000890a\n"
    )
    result = run(tmp_path / "old.txt", tmp_path / "new.csv", "--json")
    thresholds = json.loads(result.stdout)["thresholds"]
    assert thresholds == pytest.approx({"images": 1.000244, "(Unnamed Layer* 0) [Conv]": 255.062}, rel=1e-6)
    assert read_table(tmp_path / "new.csv") == thresholds


def test_a_calibration_of_nothing_is_refused(tmp_path):
    Calibration.of(Settings.make()).save(tmp_path / "calib.npz")
    result = run(tmp_path / "calib.npz", tmp_path / "out.csv")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "must contain the scale of at least one tensor, got none" in result.stderr


def test_a_calibration_becomes_a_table(tmp_path):
    histogram = klquant.histogram(np.random.default_rng(0).laplace(size=100_000), num_bins=2001, amax=15.0)
    found = Calibration.of(Settings.make(num_bins=2001))._replace(amax={"x": 15.0}, histograms={"x": histogram})
    found = found._replace(thresholds=found.search_thresholds(criterion="mse"))
    found.save(tmp_path / "calib.npz")
    assert run(tmp_path / "calib.npz", tmp_path / "t.cache", "--to", "tensorrt").exit_code == 0
    assert read_table(tmp_path / "t.cache") == pytest.approx({"x": found.thresholds["x"].threshold}, rel=1e-6)


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (b"TRT-8601-EntropyCalibration2\nx: 3c010a14\n", ["out.what"], "`format` must be given"),
        (b"TRT-8601-EntropyCalibration2\nx: zzzz\n", ["out.csv"], "in"),
        (b"TRT-8601-EntropyCalibration2\n", ["out.csv"], ""),
        (b"PK\x03\x04 damaged", ["out.csv", "--from", "calibration"], "must be a klquant calibration file"),
        (b"TRT-8601-EntropyCalibration2\nx: 3c010a14\n", ["out.csv", "--from", "calibration"], "must be a klquant"),
    ],
    ids=["target", "scale", "empty", "zip", "kind"],
)
def test_what_cannot_be_converted_is_one_line(tmp_path, monkeypatch, content, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").write_bytes(content)
    result = run("in", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / arguments[0]).exists()
