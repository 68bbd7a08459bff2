import functools
import itertools

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import klquant
from klquant import InfeasibleError, reference
from klquant.testing import COUNT_SHAPES, histograms, same_counts
from strategies import JAX_SIZES, dense, even_edges, fewer
from support.namespaces import JAX, JIT, enable_x64, needs_jax, params

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
    hist, _, levels = data.draw(histograms(sizes=[(7, 3), (15, 3), (33, 15)], shapes=COUNT_SHAPES))
    hist = np.minimum(hist, data.draw(st.sampled_from([127, 2**50])))
    stored = data.draw(same_counts(hist), label="stored")
    edges = even_edges(len(hist), 3.0)
    try:
        expected = function(hist, edges, num_quantized_bins=levels)
    except InfeasibleError:
        return
    np.testing.assert_equal(function(stored, edges, num_quantized_bins=levels), expected)


@pytest.mark.parametrize("criterion", CRITERIA)
@given(case=histograms(shapes=COUNT_SHAPES))
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


@given(histograms(shapes=COUNT_SHAPES))
def test_max_clips_nothing_and_the_next_narrower_edge_would(case):
    assume(case.hist.any())
    found = klquant.max_threshold(case.hist, case.edges, num_quantized_bins=case.num_quantized_bins)
    assert float(found.clipped) == 0
    narrower = case.edges[(case.edges < float(found)) & (case.edges > 0)]
    if narrower.size:
        assert case.hist[(case.edges[:-1] >= narrower[-1]) | (case.edges[1:] <= -narrower[-1])].any()


@given(histograms(shapes=COUNT_SHAPES), st.floats(0.01, 100))
def test_the_percentile_is_that_of_the_reference(case, percentile):
    assume(case.hist.any())
    levels = case.num_quantized_bins
    found = klquant.percentile_threshold(case.hist, case.edges, percentile=percentile, num_quantized_bins=levels)
    assert float(found) == pytest.approx(reference.percentile(case.hist, case.edges, percentile), rel=1e-9)


@fewer()
@given(histograms(sizes=[(15, 3), (33, 15), (101, 15)], shapes=COUNT_SHAPES), st.floats(1e-3, 1e3))
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


@given(histograms(shapes=COUNT_SHAPES), st.floats(0, 1))
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


FIELDS = ("value", "index", "divergence", "clipped", "sqnr_db")


def assert_same(found, expected, rtol=0.0):
    for name in FIELDS:
        one, other = (np.asarray(getattr(threshold, name)) for threshold in (found, expected))
        assert one.dtype == other.dtype, name
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol, err_msg=name)


def batches(sizes=((15, 3), (33, 15))):
    """Draw a batch of histograms, with edges for each of them or for all."""

    @st.composite
    def draw_batch(draw):
        num_bins, levels = draw(st.sampled_from(sizes))
        rows = draw(st.lists(dense(num_bins, least=1), min_size=1, max_size=3))
        ranges = draw(st.lists(st.floats(0.1, 10), min_size=len(rows), max_size=len(rows)))
        edges = np.stack([even_edges(num_bins, amax) for amax in ranges])
        return np.stack(rows), edges if draw(st.booleans()) else edges[0], levels

    return draw_batch()


@pytest.mark.parametrize("criterion", CRITERIA)
@given(batch=batches())
def test_a_batch_is_its_histograms(criterion, batch):
    hists, edges, levels = batch
    together = criterion(hists, edges, num_quantized_bins=levels)
    grid = criterion(hists[None], edges if edges.ndim == 1 else edges[None], num_quantized_bins=levels)
    assert grid.value.shape == (1, len(hists))
    for k, hist in enumerate(hists):
        alone = criterion(hist, edges if edges.ndim == 1 else edges[k], num_quantized_bins=levels)
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(together, name)[k], getattr(alone, name), err_msg=name)
            np.testing.assert_array_equal(getattr(grid, name)[0, k], getattr(alone, name), err_msg=name)


@pytest.mark.parametrize("curve", [klquant.divergence_curve, klquant.mse_curve])
@given(batch=batches())
def test_a_batch_of_curves_is_the_curves(curve, batch):
    hists, edges, levels = batch
    together = curve(hists, edges, num_quantized_bins=levels)
    bounds = np.broadcast_to(edges, (len(hists), edges.shape[-1]))
    alone = [curve(*row, num_quantized_bins=levels) for row in zip(hists, bounds, strict=True)]
    np.testing.assert_array_equal(together, alone)


@needs_jax
@pytest.mark.parametrize("criterion", CRITERIA)
@fewer()
@given(hists=st.tuples(dense(33, least=1), dense(33, least=1)), amax=st.floats(0.1, 10))
def test_jit_and_vmap_find_what_single_calls_find(criterion, hists, amax):
    import jax

    hists, edges = np.stack(hists), np.stack([even_edges(33, amax), even_edges(33, 2 * amax)])
    expected = criterion(hists, edges, num_quantized_bins=15)
    with enable_x64():
        mapped = jax.vmap(lambda h, e: criterion(h, e, num_quantized_bins=15))(JAX.asarray(hists), JAX.asarray(edges))
    assert_same(mapped, expected, rtol=1e-9)
    assert_same(JIT.call(criterion, JAX.asarray(hists), JAX.asarray(edges), num_quantized_bins=15), expected, rtol=1e-9)


@needs_jax
@pytest.mark.parametrize("criterion", CRITERIA)
@fewer()
@given(hist=dense(33, least=1), where=st.integers(0, 32), bad=st.sampled_from([np.nan, np.inf, -1.0]))
def test_bad_counts_give_nan_under_jit(criterion, hist, where, bad):
    weights = np.where(np.arange(33) == where, bad, hist)
    found = JIT.call(criterion, JAX.asarray(weights), JAX.asarray(even_edges(33, 1.0)), num_quantized_bins=15)
    assert np.isnan([found.value, found.divergence, found.clipped, found.sqnr_db]).all()
    assert int(found.index) == -1


def described(case, threshold):
    """Return the clipped share and the SQNR, from the definitions."""
    qmax, step = case.num_quantized_bins // 2, threshold / (case.num_quantized_bins // 2)
    clipped = signal = noise = 0.0
    for count, low, high in zip(case.hist.tolist(), case.edges[:-1].tolist(), case.edges[1:].tolist(), strict=True):
        width, x = high - low, (low + high) / 2
        beyond = max(0.0, min(width, high - threshold)) + max(0.0, min(width, -threshold - low))
        clipped += count * beyond / width
        signal += count * x * x
        noise += count * (x - max(-qmax, min(qmax, round(x / step))) * step) ** 2
    return clipped / case.hist.sum(dtype=float), signal, noise


@pytest.mark.parametrize("criterion", CRITERIA)
@given(case=histograms(sizes=[(15, 3), (33, 15)], shapes=COUNT_SHAPES))
def test_clipped_share_and_sqnr_are_those_of_the_definition(criterion, case):
    case = case._replace(edges=even_edges(len(case.hist), 3.0))
    try:
        found = criterion(case.hist, case.edges, num_quantized_bins=case.num_quantized_bins)
    except InfeasibleError:
        return
    clipped, signal, noise = described(case, float(found.value))
    assert float(found.clipped) == pytest.approx(clipped, abs=1e-9)
    if noise > 1e-9 * signal:
        assert float(found.sqnr_db) == pytest.approx(10 * np.log10(signal / noise), abs=1e-6)


@given(histograms(shapes=COUNT_SHAPES))
def test_the_widest_percentile_is_the_outermost_value(case):
    assume(case.hist.any())
    outer = np.flatnonzero(case.hist + case.hist[::-1])[-1]
    for find in (klquant.max_threshold, lambda *a, **o: klquant.percentile_threshold(*a, percentile=100, **o)):
        found = find(case.hist, case.edges, num_quantized_bins=case.num_quantized_bins)
        assert float(found.value) == case.edges[outer + 1]


@given(histograms(shapes=COUNT_SHAPES), st.lists(st.floats(0.01, 100), min_size=2, max_size=4).map(sorted))
def test_percentiles_increase(case, percentiles):
    assume(case.hist.any())
    found = [
        float(klquant.percentile_threshold(case.hist, case.edges, percentile=p, num_quantized_bins=3))
        for p in percentiles
    ]
    assert all(low <= high * (1 + 1e-12) for low, high in itertools.pairwise(found))


@given(histograms(sizes=[(15, 3), (33, 15), (101, 15)], shapes=COUNT_SHAPES), st.floats(1e-3, 1e3))
def test_mse_finds_the_first_minimum_of_its_curve_and_its_sqnr(case, amax):
    assume(case.hist.any())
    edges, levels = even_edges(len(case.hist), amax), case.num_quantized_bins
    found = klquant.mse_threshold(case.hist, edges, num_quantized_bins=levels)
    curve, index = klquant.mse_curve(case.hist, edges, num_quantized_bins=levels), int(found.index)
    square = (case.hist * ((edges[1:] + edges[:-1]) / 2) ** 2).sum() / case.hist.sum(dtype=float)
    assert curve[index] <= curve.min() + 2e-13 * square
    assert not (curve[:index] < curve.min() + 1e-14 * square).any()
    assert float(found.value) == edges[len(case.hist) // 2 + 1 + index]
    if curve[index] > 1e-9 * square:
        assert float(found.sqnr_db) == pytest.approx(10 * np.log10(square / curve[index]), abs=1e-6)


@pytest.mark.parametrize("function", [*CRITERIA, klquant.divergence_curve, one_sided_curve, klquant.mse_curve])
@given(case=histograms(sizes=[(15, 3), (33, 15)], shapes=COUNT_SHAPES), many=st.integers(0, 10**6))
def test_skipping_zeros_ignores_the_centre_bin(function, case, many):
    edges, centre = even_edges(len(case.hist), 1.0), len(case.hist) // 2
    with_zeros, without = (np.where(np.arange(len(case.hist)) == centre, n, case.hist) for n in (many, 0))
    if function is one_sided_curve:
        function = functools.partial(klquant.divergence_curve, one_sided=True)
    try:
        expected = function(without, edges, num_quantized_bins=case.num_quantized_bins)
    except InfeasibleError:
        return
    found = function(with_zeros, edges, num_quantized_bins=case.num_quantized_bins, skip_zeros=True)
    np.testing.assert_equal(found, expected)


@pytest.mark.parametrize("xp", params(JAX, JIT))
@pytest.mark.parametrize("criterion", CRITERIA)
@fewer()
@given(case=histograms(sizes=JAX_SIZES, shapes=COUNT_SHAPES))
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
