import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import klquant
from klquant import InfeasibleError, reference
from strategies import INTEGER_SHAPES, JAX_SIZES, counts, even_edges, fewer, histograms, stored_otherwise
from support.namespaces import JAX, JIT, params

CRITERIA = [klquant.optimal_threshold, klquant.max_threshold, klquant.percentile_threshold, klquant.mse_threshold]


def one_sided_curve(hist, edges, num_quantized_bins):
    return klquant.divergence_curve(hist, edges, num_quantized_bins=num_quantized_bins, one_sided=True)


def median_of_the_reference(hist, edges, num_quantized_bins):
    return reference.percentile(hist, edges, 50)


def one_sided_curve_of_the_reference(hist, edges, num_quantized_bins):
    return reference.one_sided_divergence_curve(hist, num_quantized_bins)


@pytest.mark.parametrize(
    "function",
    [
        *CRITERIA,
        klquant.divergence_curve,
        one_sided_curve,
        klquant.mse_curve,
        one_sided_curve_of_the_reference,
        median_of_the_reference,
    ],
)
@given(data=st.data())
def test_no_result_depends_on_how_the_counts_are_stored(function, data):
    hist, _, levels = data.draw(histograms(sizes=[(7, 3), (15, 3), (33, 15)], shapes=[up_to_127, *INTEGER_SHAPES]))
    stored = data.draw(stored_otherwise(hist), label="stored")
    edges = even_edges(len(hist), 3.0)
    try:
        expected = function(hist, edges, num_quantized_bins=levels)
    except InfeasibleError:
        return
    np.testing.assert_equal(function(stored, edges, num_quantized_bins=levels), expected)


def up_to_127(num_bins):
    return counts(num_bins, most=127)


@pytest.mark.parametrize("criterion", CRITERIA)
@given(case=histograms(shapes=INTEGER_SHAPES))
def test_t_lies_inside_the_range_and_its_description_is_sound(criterion, case):
    edges = even_edges(len(case.hist), 3.0)
    try:
        found = criterion(case.hist, edges, num_quantized_bins=case.num_quantized_bins)
    except InfeasibleError:
        return
    assert 0 < float(found) <= edges[-1]
    assert 0 <= float(found.clipped) <= 1
    beyond = case.hist[(edges[:-1] >= float(found)) | (edges[1:] <= -float(found))].sum()
    inside = case.hist[(edges[1:] <= float(found)) & (edges[:-1] >= -float(found))].sum()
    total = case.hist.sum(dtype=float)
    assert beyond / total - 1e-9 <= float(found.clipped) <= 1 - inside / total + 1e-9


@given(histograms(shapes=INTEGER_SHAPES))
def test_max_clips_nothing_and_the_next_narrower_edge_would(case):
    assume(case.hist.any())
    found = klquant.max_threshold(case.hist, case.edges, num_quantized_bins=case.num_quantized_bins)
    assert float(found.clipped) == 0
    narrower = case.edges[(case.edges < float(found)) & (case.edges > 0)]
    if narrower.size:
        assert case.hist[(case.edges[:-1] >= narrower[-1]) | (case.edges[1:] <= -narrower[-1])].any()


@given(histograms(shapes=INTEGER_SHAPES), st.floats(0.01, 100))
def test_the_percentile_is_that_of_the_reference(case, percentile):
    assume(case.hist.any())
    levels = case.num_quantized_bins
    found = klquant.percentile_threshold(case.hist, case.edges, percentile=percentile, num_quantized_bins=levels)
    assert float(found) == pytest.approx(reference.percentile(case.hist, case.edges, percentile), rel=1e-9)


@fewer()
@given(histograms(sizes=[(15, 3), (33, 15), (101, 15)], shapes=INTEGER_SHAPES), st.floats(1e-3, 1e3))
def test_the_squared_errors_are_those_of_the_reference(case, amax):
    assume(case.hist.any())
    edges = even_edges(len(case.hist), amax)
    curve = klquant.mse_curve(case.hist, edges, num_quantized_bins=case.num_quantized_bins)
    expected = reference.squared_errors(case.hist, edges, case.num_quantized_bins)
    np.testing.assert_allclose(curve, expected, rtol=0, atol=1e-12 * amax**2)


@given(histograms(sizes=[(15, 5), (33, 5), (101, 15), (255, 15)]))
def test_the_one_sided_curve_is_that_of_the_reference(case):
    curve = klquant.divergence_curve(case.hist, case.edges, num_quantized_bins=case.num_quantized_bins, one_sided=True)
    expected = reference.one_sided_divergence_curve(case.hist, case.num_quantized_bins)
    np.testing.assert_array_equal(np.isinf(curve), np.isinf(expected))
    np.testing.assert_allclose(curve, expected, rtol=0, atol=1e-12)


@given(histograms(shapes=INTEGER_SHAPES), st.floats(0, 1))
def test_a_floor_is_kept_and_changes_nothing_below_t(case, ratio):
    def search(**options):
        return klquant.optimal_threshold(case.hist, case.edges, num_quantized_bins=case.num_quantized_bins, **options)

    try:
        free, floored = search(), search(min_ratio=ratio)
    except InfeasibleError:
        return
    assert float(floored) >= ratio * case.edges[-1]
    if float(free) >= ratio * case.edges[-1]:
        assert float(floored) == float(free)


@pytest.mark.parametrize("xp", params(JAX, JIT))
@pytest.mark.parametrize("criterion", CRITERIA)
@fewer()
@given(case=histograms(JAX_SIZES, INTEGER_SHAPES))
def test_jax_finds_what_numpy_finds(xp, criterion, case):
    edges = even_edges(len(case.hist), 1.0)
    try:
        expected = criterion(case.hist, edges, num_quantized_bins=case.num_quantized_bins)
    except InfeasibleError:
        return
    hist, edges = xp.asarray(case.hist), xp.asarray(edges)
    found = xp.call(criterion, hist, edges, num_quantized_bins=case.num_quantized_bins)
    assert float(found) == pytest.approx(float(expected), rel=1e-12)
    assert float(found.sqnr_db) == pytest.approx(float(expected.sqnr_db), rel=1e-9, nan_ok=True)
