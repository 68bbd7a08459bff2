"""Asymmetric ranges: symmetric tensors keep their grid, and no tensor is expected to lose by its own range."""

import warnings

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import klquant
from klquant.backends.calibration import Calibration
from klquant.backends.ranges import Candidate, better_range, candidates, expected_error, observed_range, union
from klquant.backends.settings import Settings
from klquant.errors import CalibrationWarning
from klquant.testing import COUNT_SHAPES, histograms
from strategies import even_edges

AMAX = st.floats(1e-3, 1e3)
SHARES = st.floats(0.01, 1.0)


def histogram(data):
    case = data.draw(histograms(shapes=COUNT_SHAPES))
    assume(case.hist.any())
    return klquant.Histogram(case.hist, even_edges(len(case.hist), data.draw(AMAX, "amax")))


def ends(found):
    """Return the smallest and the largest value that could have been counted."""
    filled = np.flatnonzero(found.hist)
    return float(found.edges[filled[0]]), float(found.edges[filled[-1] + 1])


def mirrored(found):
    return klquant.Histogram(found.hist + found.hist[::-1], found.edges)


@given(data=st.data())
def test_a_symmetric_tensor_keeps_the_symmetric_grid_for_any_t(data):
    values = mirrored(histogram(data))
    high = ends(values)[1]
    threshold = high * data.draw(SHARES, "T / amax")
    one = Candidate(observed_range(threshold, -high, high), values)
    assert better_range([one, one], threshold / 127, 128) is None


@pytest.mark.parametrize("criterion", ["entropy", "max", "percentile", "mse"])
@given(data=st.data())
def test_a_symmetric_tensor_keeps_the_symmetric_grid_for_any_criterion(criterion, data):
    values = np.concatenate([part := data.draw(npst.arrays(np.float64, 50, elements=st.floats(0.01, 10))), -part])
    amax = float(values.max())
    found = Calibration.of(Settings())._replace(
        amax={"a": amax}, histograms={"a": klquant.histogram(values, num_bins=1001)}, ranges={"a": (-amax, amax)}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        found = found._replace(thresholds=found.search_thresholds(criterion=criterion))
    one = candidates(found)["a"]
    assert better_range([one], found.thresholds["a"].threshold / 127, 128) is None


@given(data=st.data())
def test_the_range_of_a_tensor_has_less_error_and_lies_within_t(data):
    values = histogram(data)
    low, high = ends(values)
    threshold = max(-low, high) * data.draw(SHARES, "T / amax")
    found = better_range([Candidate(observed_range(threshold, low, high), values)], threshold / 127, 128)
    if found is not None:
        assert -threshold <= found.low <= 0 <= found.high <= threshold
        assert 0 <= found.zero_point <= 255
        assert expected_error(values, found.scale, found.zero_point) < expected_error(values, threshold / 127, 128)


@given(data=st.data())
def test_a_union_contains_its_parts_and_no_more(data):
    parts = [observed_range(10.0, *sorted(data.draw(st.tuples(*[st.floats(-9, 9)] * 2)))) for _ in range(3)]
    whole = union(parts)
    assert whole.low == min(part.low for part in parts)
    assert whole.high == max(part.high for part in parts)


@given(data=st.data())
def test_the_expected_error_scales_with_the_values(data):
    values, factor = histogram(data), 2.0 ** data.draw(st.integers(-8, 8), "factor")
    scale, zero_point = data.draw(st.floats(1e-3, 1.0), "scale"), data.draw(st.integers(0, 255), "zero point")
    scaled = klquant.Histogram(values.hist, values.edges * factor)
    expected = factor**2 * expected_error(values, scale, zero_point)
    assert expected_error(scaled, scale * factor, zero_point) == pytest.approx(expected, rel=1e-9)
