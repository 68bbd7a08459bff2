"""Ranges that are fitted to the functions behind a tensor."""

import math

import numpy as np
import pytest

import klquant
from klquant.backends.calibration import Calibration
from klquant.backends.curves import Behind, Curve
from klquant.backends.function_ranges import function_ranges
from klquant.backends.ranges import Candidate, Range, better_range, expected_error, observed_range
from klquant.backends.settings import Settings
from klquant.backends.thresholds import LayerThreshold

RNG = np.random.default_rng(5)
LOPSIDED = np.where(RNG.random(100_000) < 0.7, -20, 4) * np.abs(RNG.normal(size=100_000))
WIDE = float(np.abs(LOPSIDED).max())
POINTS = np.linspace(-WIDE, WIDE, 8001)


def silu(x):
    return x / (1 + np.exp(-x))


def curve(*functions):
    return Curve(POINTS, np.stack([function(POINTS) for function in functions]))


def rounded(x, scale, zero_point):
    return (np.clip(np.rint(x / scale) + zero_point, 0, 255) - zero_point) * scale


def calibrated(threshold=WIDE, **fields):
    fields = {"guarded": True, **fields}
    layer = LayerThreshold(WIDE, threshold, math.nan, 0.0, **fields)
    return Calibration.of(Settings())._replace(
        amax={"x": WIDE},
        histograms={"x": klquant.histogram(LOPSIDED, num_bins=4001)},
        ranges={"x": (float(LOPSIDED.min()), float(LOPSIDED.max()))},
        thresholds={"x": layer},
        zeros={"x": 0},
    )


def in_use(found):
    return observed_range(found.thresholds["x"].threshold, *found.ranges["x"])


def measured(function, found):
    wanted = in_use(found)
    error = function(rounded(LOPSIDED, wanted.scale, wanted.zero_point)) - function(LOPSIDED)
    return float((error**2).mean())


@pytest.mark.parametrize("function", [silu, np.tanh, lambda x: np.minimum(x, 3.0)])
@pytest.mark.parametrize(("scale", "zero_point"), [(0.3, 200), (0.06, 128), (0.9, 255)])
def test_the_expected_error_is_that_behind_the_function(function, scale, zero_point):
    behind = Behind.of(klquant.histogram(LOPSIDED, num_bins=4001), curve(function))
    error = ((function(rounded(LOPSIDED, scale, zero_point)) - function(LOPSIDED)) ** 2).mean()
    share = error / (function(LOPSIDED) ** 2).mean()
    assert behind.error(scale, zero_point) == pytest.approx(share * (LOPSIDED**2).mean(), rel=0.05)


@pytest.mark.parametrize("scale", [0.5, 0.05])
def test_the_identity_has_the_error_of_the_tensor(scale):
    histogram = klquant.histogram(LOPSIDED, num_bins=4001)
    behind = Behind.of(histogram, curve(lambda x: x)).error(scale, 128)
    assert behind == pytest.approx(expected_error(histogram, scale, 128), rel=0.05)


def test_levels_go_where_the_function_is_not_flat():
    found = function_ranges(calibrated(), {"x": curve(silu)})
    low, high = found.ranges["x"]
    assert -15 < low < -2  # the least value is about -85
    assert high > 0.7 * LOPSIDED.max()
    assert found.thresholds["x"].criterion == "fitted"
    assert found.thresholds["x"].threshold == max(-low, high)
    assert measured(silu, found) < 0.1 * measured(silu, calibrated())


def test_a_range_that_is_good_enough_stays():
    given = calibrated()
    assert function_ranges(given, {"x": curve(lambda x: x)}) == given
    assert function_ranges(given, {}) == given


@pytest.mark.parametrize("criterion", ["max", "mse", "entropy"])
def test_only_a_guarded_threshold_may_grow(criterion):
    tight = calibrated(3.0, criterion=criterion, guarded=False)
    assert in_use(function_ranges(tight, {"x": curve(silu)})).high <= 3.0
    assert in_use(function_ranges(calibrated(3.0), {"x": curve(silu)})).high > 5.0


@pytest.mark.parametrize("fields", [{"criterion": "fixed", "guarded": False}, {"num_bits": 4}])
def test_given_thresholds_and_other_bits_stay(fields):
    given = calibrated(**fields)
    assert function_ranges(given, {"x": curve(silu)}) == given


def test_a_calibration_without_ranges_stays():
    given = calibrated()._replace(ranges={})
    assert function_ranges(given, {"x": curve(silu)}) == given


def test_a_function_that_is_constant_changes_nothing():
    given = calibrated()
    assert function_ranges(given, {"x": curve(lambda x: 0 * x)}) == given


def test_every_function_of_a_tensor_counts():
    both = function_ranges(calibrated(), {"x": curve(silu, lambda x: silu(-x))}).ranges["x"]
    one = function_ranges(calibrated(), {"x": curve(silu)}).ranges["x"]
    assert both[0] < 2 * one[0]


def test_a_grid_is_chosen_by_the_error_behind_the_function():
    histogram = klquant.histogram(LOPSIDED, num_bins=4001)
    narrow = Range(-5.0, 16.0)
    assert better_range([Candidate(narrow, histogram, curve(silu))], WIDE / 127, 128) == narrow
    assert better_range([Candidate(narrow, histogram)], WIDE / 127, 128) is None
