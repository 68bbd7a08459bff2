"""Thresholds that are fitted to grids with a zero point."""

import math

import numpy as np
import pytest

import klquant
from klquant.backends.calibration import Calibration
from klquant.backends.grid_thresholds import GAIN_DB, grid_thresholds
from klquant.backends.onnx import calibrate, quantize
from klquant.backends.ranges import expected_error, observed_range
from klquant.backends.settings import Settings
from klquant.backends.thresholds import LayerThreshold, search_thresholds
from support.onnx_models import build

RNG = np.random.default_rng(3)
ONE_SIDED = np.abs(RNG.laplace(size=200_000))
NEARLY = np.where(RNG.random(200_000) < 0.1, -0.2, 1.0) * ONE_SIDED
EVEN = RNG.laplace(size=200_000)


def calibrated(data, threshold, *, guarded=True, num_bits=8, criterion="entropy"):
    """Return a calibration with one tensor."""
    amax = float(np.abs(data).max())
    layer = LayerThreshold(amax, threshold, math.nan, 0.0, criterion=criterion, num_bits=num_bits, guarded=guarded)
    return Calibration.of(Settings())._replace(
        amax={"x": amax},
        histograms={"x": klquant.histogram(data, num_bins=2001)},
        ranges={"x": (float(data.min()), float(data.max()))},
        thresholds={"x": layer},
        zeros={"x": 0},
    )


def best_for_the_symmetric_grid(data):
    return float(klquant.mse_threshold(*klquant.histogram(data, num_bins=2001)))


@pytest.mark.parametrize("data", [ONE_SIDED, NEARLY])
def test_finer_steps_let_t_be_wider(data):
    clipping = calibrated(data, best_for_the_symmetric_grid(data) / 2)
    found = grid_thresholds(clipping)["x"]
    assert found.criterion == "fitted"
    assert found.threshold > best_for_the_symmetric_grid(data) / 2
    assert math.isnan(found.sqnr_db)

    def error(threshold):
        wanted = observed_range(threshold, *clipping.ranges["x"])
        return expected_error(clipping.histograms["x"], wanted.scale, wanted.zero_point)

    candidates = [clipping.thresholds["x"].threshold, best_for_the_symmetric_grid(data), clipping.amax["x"]]
    within = [one for one in candidates if error(one) <= min(map(error, candidates)) * 10 ** (GAIN_DB / 10)]
    assert found.threshold == max(within)


@pytest.mark.parametrize("data", [ONE_SIDED, NEARLY, EVEN])
def test_a_threshold_that_is_nearly_the_best_stays(data):
    calibration = calibrated(data, best_for_the_symmetric_grid(data))
    assert grid_thresholds(calibration)["x"] is calibration.thresholds["x"]


@pytest.mark.parametrize("options", [{"guarded": False}, {"num_bits": 4}, {"guarded": False, "criterion": "mse"}])
def test_what_the_guard_does_not_watch_over_stays(options):
    calibration = calibrated(ONE_SIDED, 1.0, **options)
    assert grid_thresholds(calibration) == calibration.thresholds


def test_older_files_without_ranges_keep_their_thresholds():
    calibration = calibrated(ONE_SIDED, 1.0)._replace(ranges={})
    assert grid_thresholds(calibration) == calibration.thresholds


def test_tensors_that_stay_symmetric_are_fitted_to_that_grid():
    """A clipped T is mended there too, but what suits finer steps is not taken."""
    calibration = calibrated(NEARLY, best_for_the_symmetric_grid(NEARLY) / 2)
    free, kept = grid_thresholds(calibration)["x"], grid_thresholds(calibration, ["x"])["x"]
    assert best_for_the_symmetric_grid(NEARLY) <= kept.threshold <= free.threshold


def test_the_file_keeps_what_the_guard_watches_over(tmp_path):
    found = search_thresholds({"x": 1.0, "y": 1.0}, dict.fromkeys("xy", klquant.histogram(EVEN, num_bins=2001)))
    assert all(layer.guarded for layer in found.values())
    other = search_thresholds({"x": 1.0}, {"x": klquant.histogram(EVEN)}, criterion="mse")
    assert not other["x"].guarded
    calibration = calibrated(EVEN, 1.0)
    calibration.save(tmp_path / "c.npz")
    assert Calibration.load(tmp_path / "c.npz").thresholds["x"].guarded


def test_quantize_fits_the_thresholds_of_engines_with_zero_points():
    model = build("float[n, 8] x", "float y", "a = MatMul(x, w) r = Relu(a) y = MatMul(r, v)", w=(8, 16), v=(16, 4))
    calibration = calibrate(model, [RNG.normal(size=(64, 8)).astype(np.float32)])
    layer = calibration.thresholds["r"]._replace(threshold=calibration.amax["r"] / 4)
    clipping = calibration._replace(thresholds=calibration.thresholds | {"r": layer})
    found = {engine: quantize(model, clipping, engine=engine).thresholds["r"] for engine in ("onnxruntime", "tensorrt")}
    assert found["onnxruntime"] > 2 * layer.threshold
    assert found["tensorrt"] == layer.threshold
    assert quantize(model, clipping, engine="onnxruntime", asymmetric=False).thresholds["r"] == layer.threshold
