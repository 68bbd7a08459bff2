"""Asymmetric ranges: what they cost, and when they replace [-T, T]."""

import numpy as np
import pytest

import klquant
from klquant.backends.calibration import Calibration
from klquant.backends.ranges import Candidate, Range, better_range, candidates, expected_error, observed_range, union
from klquant.backends.settings import Settings
from klquant.backends.thresholds import LayerThreshold

RNG = np.random.default_rng(0)
NORMAL = RNG.normal(size=50_000)
SILU = 3 * NORMAL / (1 + np.exp(-3 * NORMAL))
LEAKY = np.where(NORMAL > 0, NORMAL, 0.01 * NORMAL)
SYMMETRIC = np.concatenate([NORMAL, -NORMAL])


def candidate(values, threshold=None):
    amax = float(np.abs(values).max())
    wanted = observed_range(threshold or amax, float(values.min()), float(values.max()))
    return Candidate(wanted, klquant.histogram(values[values != 0]))


def measured(values, scale, zero_point):
    levels = np.clip(np.rint(values / scale), -zero_point, 255 - zero_point)
    return ((levels * scale - values) ** 2).mean()


@pytest.mark.parametrize(
    ("threshold", "low", "high", "expected"),
    [
        (5.0, -0.28, 9.0, (-0.28, 5.0)),
        (5.0, -9.0, 0.1, (-5.0, 0.1)),
        (5.0, -9.0, 9.0, (-5.0, 5.0)),
        (5.0, 2.0, 3.0, (0.0, 3.0)),
        (5.0, -3.0, -2.0, (-3.0, 0.0)),
    ],
)
def test_the_observed_range_lies_in_that_of_t_and_contains_0(threshold, low, high, expected):
    assert observed_range(threshold, low, high) == expected


def test_zero_is_a_level():
    found = Range(-0.28, 5.0)
    assert found.scale == 5.28 / 255
    assert found.zero_point == 14
    assert (Range(0.0, 2.0).zero_point, Range(-2.0, 0.0).zero_point) == (0, 255)


@pytest.mark.parametrize("values", [SILU, LEAKY, SYMMETRIC])
@pytest.mark.parametrize(("scale", "zero_point"), [(0.01, 128), (0.05, 14), (0.002, 30), (0.5, 3)])
def test_the_expected_error_is_that_of_the_values(values, scale, zero_point):
    expected = measured(values, scale, zero_point)
    assert expected_error(klquant.histogram(values), scale, zero_point) == pytest.approx(expected, rel=0.02)


def test_the_expected_error_of_nothing_is_0():
    assert expected_error(klquant.histogram(np.zeros(0), amax=1.0), 0.1, 128) == 0


@pytest.mark.parametrize("values", [SILU, LEAKY, -SILU, np.abs(NORMAL)])
def test_one_sided_values_get_their_own_range(values):
    one = candidate(values)
    scale = float(np.abs(values).max()) / 127
    found = better_range([one], scale, 128)
    assert found == one.range
    assert measured(values, found.scale, found.zero_point) < 0.5 * measured(values, scale, 128)


def test_symmetric_values_keep_the_symmetric_grid():
    assert better_range([candidate(SYMMETRIC)], float(SYMMETRIC.max()) / 127, 128) is None


def test_a_range_that_clips_more_than_the_symmetric_one_is_not_better():
    tight = candidate(SILU)._replace(range=Range(-0.28, 0.1))
    assert better_range([tight], float(SILU.max()) / 127, 128) is None


def test_tensors_that_share_a_grid_get_the_union_of_their_ranges():
    assert union([Range(-1.0, 2.0), Range(-3.0, 1.0)]) == Range(-3.0, 2.0)
    found = better_range([candidate(SILU), candidate(0.1 * NORMAL)], float(SILU.max()) / 127, 128)
    assert found == Range(float(0.1 * NORMAL.min()), float(SILU.max()))


def calibration(**fields):
    threshold = LayerThreshold(9.0, 5.0, 0.1, 0.0)
    histogram = klquant.Histogram(np.array([1, 3, 9, 2, 2]), np.linspace(-9, 9, 6))
    found = Calibration.of(Settings())._replace(
        amax={"a": 9.0}, histograms={"a": histogram}, thresholds={"a": threshold}, ranges={"a": (-0.5, 9.0)}
    )
    return found._replace(**fields)


def test_a_calibration_gives_its_tensors_as_candidates():
    found = candidates(calibration(zeros={"a": 4}))
    assert found["a"].range == (-0.5, 5.0)
    np.testing.assert_array_equal(found["a"].histogram.hist, [1, 3, 5, 2, 2])


def test_without_a_number_of_zeros_the_centre_bin_counts_as_zeros():
    np.testing.assert_array_equal(candidates(calibration())["a"].histogram.hist, [1, 3, 0, 2, 2])


@pytest.mark.parametrize(
    "fields",
    [
        {"ranges": {}},
        {"histograms": {}},
        {"thresholds": {"a": LayerThreshold(9.0, 5.0, 0.1, 0.0, criterion="fixed")}},
    ],
)
def test_older_files_and_given_thresholds_have_no_candidates(fields):
    assert candidates(calibration(**fields)) == {}
