"""Criteria, formats and backends of other packages are found by their entry points and used by name."""

import sys

import numpy as np
import pytest
from click.testing import CliRunner

import klquant
from klquant.backends.calibration import Calibration
from klquant.backends.formats import read_table, write_table
from klquant.backends.plugins import installed, load
from klquant.backends.settings import Settings
from klquant.cli import cli
from klquant.errors import InvalidInputError

MODULE = """
from pathlib import Path
from klquant.backends.formats import Format
import klquant

def half(hist, edges, *, num_quantized_bins):
    return float(edges[-1]) / 2

def found(hist, edges, *, num_quantized_bins):
    return klquant.max_threshold(hist, edges, num_quantized_bins=num_quantized_bins)

def read(path):
    return {"x": 1.5}

def write(path, thresholds):
    Path(path).write_text(repr(dict(thresholds)))

lines = Format(".lines", read, write)
"""
POINTS = """
[klquant.criteria]
half = addition_of_a_test:half
found = addition_of_a_test:found
broken = addition_of_a_test:nothing
[klquant.formats]
lines = addition_of_a_test:lines
[klquant.backends]
mine = addition_of_a_test
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "addition-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: addition\\nVersion: 1.0\\n")
    (folder / "entry_points.txt").write_text(POINTS)
    (tmp_path / "addition_of_a_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("addition_of_a_test", None)


@pytest.fixture
def calibration():
    x = np.random.default_rng(0).normal(size=10_000)
    histogram = klquant.histogram(x, num_bins=1001)
    found = Calibration.of(Settings())._replace(amax={"x": float(np.abs(x).max())}, histograms={"x": histogram})
    return found._replace(thresholds=found.search_thresholds())


def test_they_are_listed_without_an_import(package):
    assert {"half", "found", "broken"} <= set(installed("criteria"))
    assert {"lines"} <= set(installed("formats"))
    assert "addition_of_a_test" not in sys.modules
    assert load("backends", "mine").__name__ == "addition_of_a_test"


def test_a_criterion_is_used_by_name(package, calibration):
    found = calibration.search_thresholds(criterion="half")["x"]
    assert found.threshold == pytest.approx(calibration.amax["x"] / 2)
    assert found.criterion == "half"
    assert 10 < found.sqnr_db < 60
    assert calibration.search_thresholds(criterion="found")["x"].threshold == pytest.approx(calibration.amax["x"])
    settings = Settings.make(overrides={"x": {"criterion": "half"}})
    assert calibration._replace(settings=settings).search_thresholds()["x"].criterion == "half"


def test_a_calibration_by_it_can_be_saved_and_used_on_the_command_line(package, calibration, tmp_path):
    calibration._replace(thresholds=calibration.search_thresholds(criterion="half")).save(tmp_path / "calib.npz")
    assert Calibration.load(tmp_path / "calib.npz").thresholds["x"].criterion == "half"
    command = ["convert", str(tmp_path / "calib.npz"), str(tmp_path / "t.lines"), "--to", "lines"]
    assert CliRunner().invoke(cli, command, catch_exceptions=False).exit_code == 0
    assert (tmp_path / "t.lines").read_text().startswith("{'x': ")


def test_a_format_is_used_by_name(package, tmp_path):
    write_table(tmp_path / "a", {"y": 2.0}, format="lines")
    assert (tmp_path / "a").read_text() == "{'y': 2.0}"
    assert read_table(tmp_path / "a", format="lines") == {"x": 1.5}


def test_unknown_names_list_what_is_installed(package, calibration):
    with pytest.raises(InvalidInputError, match=r"max, percentile, mse, .*half.* got 'hal'; did you mean 'half'"):
        calibration.search_thresholds(criterion="hal")
    with pytest.raises(InvalidInputError, match=r"expected one of the installed backends .*mine.*, got 'yours'"):
        load("backends", "yours")


def test_one_that_cannot_be_imported_is_named(package, calibration):
    with pytest.raises(
        InvalidInputError, match="`addition_of_a_test:nothing`, one of the criteria, cannot be imported"
    ):
        calibration.search_thresholds(criterion="broken")
