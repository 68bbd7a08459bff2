import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import klquant
from klquant import InfeasibleError, InvalidInputError
from klquant.testing import edges, histograms
from strategies import SIZES

SMALL = histograms(sizes=[(num_bins, levels) for num_bins, levels in SIZES if num_bins <= 33])


def curve_of(hist, edges, levels):
    return klquant.divergence_curve(hist, edges, num_quantized_bins=levels)


@given(histograms())
def test_valid_histograms_pass_or_are_infeasible(case):
    curve = curve_of(*case)
    assert len(curve) == len(case.hist) // 2 - case.num_quantized_bins // 2 + 1
    try:
        klquant.optimal_threshold(case.hist, case.edges, num_quantized_bins=case.num_quantized_bins)
    except InfeasibleError:
        assert np.isinf(curve).all()
    else:
        assert np.isfinite(curve).any()


@given(SMALL, st.data(), st.sampled_from([np.nan, np.inf, -np.inf, -1.0, -1e-300]))
def test_the_error_names_the_index_of_a_bad_weight(case, data, bad):
    weights = case.hist.astype(np.float64)
    where = data.draw(st.integers(0, len(weights) - 1))
    weights[where] = bad
    with pytest.raises(InvalidInputError, match=f"`hist` must .* got {bad} at index {where}"):
        curve_of(weights, *case[1:])


@given(SMALL, st.data())
def test_one_negative_count_is_refused(case, data):
    hist = case.hist.astype(np.int64)
    hist[data.draw(st.integers(0, len(hist) - 1))] = -1
    with pytest.raises(InvalidInputError, match="`hist` must not be negative, got -1"):
        curve_of(hist, *case[1:])


@given(SMALL, st.data(), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_one_bad_edge_is_refused(case, data, bad):
    broken = case.edges.copy()
    broken[data.draw(st.integers(0, len(broken) - 1))] = bad
    with pytest.raises(InvalidInputError, match="`edges` must be finite and strictly increasing"):
        curve_of(case.hist, broken, case.num_quantized_bins)


@given(SMALL, st.data())
def test_two_edges_in_the_wrong_order_are_refused(case, data):
    first, second = data.draw(st.lists(st.integers(0, len(case.hist)), min_size=2, max_size=2, unique=True))
    broken = case.edges.copy()
    broken[[first, second]] = broken[[second, first]]
    with pytest.raises(InvalidInputError, match="`edges` must be finite and strictly increasing"):
        curve_of(case.hist, broken, case.num_quantized_bins)


@given(SMALL, st.floats(1e-4, 10), st.sampled_from([-1, 1]))
def test_edges_that_are_not_around_zero_are_refused(case, bins, sign):
    shifted = case.edges + sign * bins * np.diff(case.edges).min()
    with pytest.raises(InvalidInputError, match="`edges` must be symmetric about 0"):
        curve_of(case.hist, shifted, case.num_quantized_bins)


@given(SMALL, st.integers(-3, 3))
def test_edges_of_another_length_are_refused(case, more):
    assume(more != 0)
    others = np.arange(len(case.edges) + more) - (len(case.edges) + more - 1) / 2
    with pytest.raises(InvalidInputError, match=f"`edges` must have shape .* got .{len(others)},"):
        curve_of(case.hist, others, case.num_quantized_bins)


@given(st.integers(2, 20), st.data())
def test_even_numbers_of_bins_are_refused(half, data):
    num_bins = 2 * half
    with pytest.raises(InvalidInputError, match=f"odd number of bins, got {num_bins}"):
        curve_of(np.ones(num_bins), data.draw(edges(num_bins + 1))[: num_bins + 1], 3)


@given(SMALL, st.integers(-5, 400))
def test_even_or_too_many_levels_are_refused(case, levels):
    assume(levels % 2 == 0 or levels < 3 or levels > len(case.hist))
    with pytest.raises(InvalidInputError, match=f"num_quantized_bins.* {levels}"):
        curve_of(case.hist, case.edges, levels)


@given(SMALL, st.data())
def test_totals_beyond_64_bits_are_refused(case, data):
    hist = case.hist.astype(np.uint64)
    first, second = data.draw(st.lists(st.integers(0, len(hist) - 1), min_size=2, max_size=2, unique=True))
    hist[[first, second]] = 2**62
    with pytest.raises(InvalidInputError, match=r"must have a total below 2\*\*63"):
        curve_of(hist, *case[1:])
