from math import isnan

import numpy as np
import pytest

import klquant
from klquant import InfeasibleError, Threshold, reference
from klquant._search import bin_by_bin
from support.cases import by_hand, even_edges, golden, listed
from support.namespaces import JAX, JIT, NUMPY, READ_ONLY, enable_x64, needs_jax, params

FIELDS = ("value", "index", "divergence", "clipped", "sqnr_db", "tie_low", "tie_high")


def golden_on(xp, *bins):
    """Return the cases for one library. Under jit each number of bins costs seconds of compilation."""
    (library,) = params(xp)
    return [pytest.param(xp, *p.values, id=f"{xp.name}-{p.id}", marks=library.marks) for p in golden(*bins)]


@pytest.mark.parametrize(("xp", "case"), golden_on(NUMPY) + golden_on(JAX) + golden_on(JIT, 257, 1001, 2001, 12001))
def test_golden_thresholds(xp, case):
    hist, edges = xp.asarray(case.hist), xp.asarray(case.edges)
    if not case.feasible and not xp.is_traced:
        with pytest.raises(InfeasibleError, match="must have a feasible candidate"):
            klquant.optimal_threshold(hist, edges)
        return
    threshold = xp.call(klquant.optimal_threshold, hist, edges)
    index = int(threshold.index)
    if not case.feasible:
        assert index == -1
        return
    assert index in case.ok_index
    if case.exact_tie:
        assert index == case.ok_index[0] == listed(case.name)["index"]
    assert float(threshold) == case.edges[len(case.hist) // 2 + 127 + index + 1]
    assert abs(float(threshold.divergence) - case.divergence[index]) <= 1e-12


@pytest.mark.parametrize(("xp", "case"), golden_on(NUMPY) + golden_on(JAX, 1001) + golden_on(JIT, 257, 1001))
def test_golden_curves(xp, case):
    curve = np.asarray(xp.call(klquant.divergence_curve, xp.asarray(case.hist), xp.asarray(case.edges)))
    np.testing.assert_array_equal(np.isinf(curve), np.isinf(case.divergence))
    np.testing.assert_allclose(curve, case.divergence, rtol=0, atol=1e-12)


@pytest.mark.parametrize("xp", params(JIT))
@pytest.mark.parametrize(("num_bins", "levels"), [(75, 5), (125, 5), (1001, 255)])
def test_merge_factors_that_jax_computes_together_reach_beyond_the_bins(xp, num_bins, levels):
    hist, edges = np.random.default_rng(num_bins).integers(1, 1000, num_bins), even_edges(num_bins)
    curve = xp.call(klquant.divergence_curve, xp.asarray(hist), xp.asarray(edges), num_quantized_bins=levels)
    expected = klquant.divergence_curve(hist, edges, num_quantized_bins=levels)
    np.testing.assert_allclose(curve, expected, rtol=0, atol=1e-12)


def search(xp, hist, edges=None, **options):
    edges = even_edges(len(hist)) if edges is None else edges
    return xp.call(klquant.optimal_threshold, xp.asarray(hist), xp.asarray(edges), **options)


@pytest.mark.parametrize("xp", params(NUMPY, READ_ONLY))
@pytest.mark.parametrize("case", by_hand())
def test_curves_by_hand(xp, case):
    hist, edges = xp.asarray(case.hist), xp.asarray(even_edges(len(case.hist)))
    curve = xp.call(klquant.divergence_curve, hist, edges, num_quantized_bins=case.num_quantized_bins, eps=case.eps)
    assert xp.owns(curve)
    assert curve.dtype == np.float64
    np.testing.assert_allclose(curve, case.divergence, rtol=0, atol=1e-14)


@pytest.mark.parametrize("case", by_hand())
def test_thresholds_by_hand(case):
    threshold = search(NUMPY, case.hist, num_quantized_bins=case.num_quantized_bins, eps=case.eps)
    index = int(np.argmin(case.divergence))
    assert int(threshold.index) == index
    assert float(threshold.value) == case.num_quantized_bins // 2 + index + 0.5
    np.testing.assert_allclose(threshold.divergence, case.divergence[index], rtol=0, atol=1e-14)


def test_the_result_is_in_the_library_of_the_histogram(xp):
    threshold = search(xp, [1, 0, 2, 2, 2, 1, 1], num_quantized_bins=3)
    assert isinstance(threshold, Threshold)
    fields = vars(threshold)
    assert xp.owns(*fields.values())
    assert [fields[name].dtype for name in FIELDS] == ["float64", "int32", *["float64"] * 5]
    assert all(field.shape == () for field in fields.values())
    expected = search(NUMPY, [1, 0, 2, 2, 2, 1, 1], num_quantized_bins=3)
    assert [float(fields[name]) for name in FIELDS] == pytest.approx([getattr(expected, n) for n in FIELDS], abs=1e-14)


def test_the_first_of_equal_minima_wins(xp):
    # the mass lies within the narrowest window: no candidate but the first can be the first minimum
    threshold = search(xp, [0, 0, 0, 5, 0, 0, 0], num_quantized_bins=3)
    assert (int(threshold.index), float(threshold.value), float(threshold.divergence)) == (0, 1.5, 0.0)


def test_nothing_feasible_is_an_error_or_nan_under_jit(xp):
    if not xp.is_traced:
        with pytest.raises(InfeasibleError):
            search(xp, np.zeros(7, int), num_quantized_bins=3)
        return
    threshold = search(xp, np.zeros(7, int), num_quantized_bins=3)
    assert isnan(threshold.value)
    assert isnan(threshold.divergence)
    assert int(threshold.index) == -1
    assert isnan(threshold.tie_low)
    assert isnan(threshold.tie_high)
    resolved = search(xp, np.zeros(7, int), num_quantized_bins=3, tie_width=0.1)
    assert (isnan(resolved.value), int(resolved.index)) == (True, -1)


@pytest.mark.parametrize("hist", [[0, 0, 0, 0, 0, 0, 0], [4, 0, 0, 0, 0, 0, 0]])
def test_infeasible_candidates_are_infinite(xp, hist):
    curve = xp.call(klquant.divergence_curve, xp.asarray(hist), xp.asarray(even_edges(7)), num_quantized_bins=3)
    np.testing.assert_array_equal(curve, np.full(3, np.inf))


def test_weights_below_eps_are_infeasible():
    hist = np.array([0, 0, 0, 1e-5, 0, 0, 0])
    curve = klquant.divergence_curve(hist, even_edges(7), num_quantized_bins=3)
    np.testing.assert_array_equal(curve, np.full(3, np.inf))


@pytest.mark.parametrize(
    ("hist", "feasible"),
    [
        ([0, 0, 4, 0.04, 4, 0, 0], [False, False, False]),  # the centre bin, from half-width 2 on
        ([0.04, 4, 4, 4, 4, 0, 0], [True, True, False]),  # the first bin
        ([0, 0, 4, 4, 4, 4, 0.04], [True, True, False]),  # the last bin
        ([0, 0, 4, 4, 4, 0.04, 4], [True, True, False]),  # the last but one
    ],
)
def test_a_candidate_is_infeasible_if_smoothing_uses_up_a_bin_of_p(hist, feasible):
    curve = klquant.divergence_curve(np.array(hist), even_edges(7), num_quantized_bins=3, eps=0.2)
    assert np.isfinite(curve).tolist() == feasible
    np.testing.assert_allclose(curve, reference.divergence_curve(np.array(hist), 3, 0.2), rtol=0, atol=1e-14)


def test_a_weight_that_smoothing_almost_uses_up_still_counts(xp):
    """Smoothing leaves 2e-19 of the middle weight if three of 33 bins are filled: (p - q) / q rounds to -1."""
    hist = np.zeros(33)
    hist[[0, 18, 19]] = 1.0, np.nextafter(1e-3, 1), 1.0
    curve = np.asarray(
        xp.call(klquant.divergence_curve, xp.asarray(hist), xp.asarray(even_edges(33)), num_quantized_bins=15)
    )
    expected = reference.divergence_curve(hist, 15)
    assert expected[9] == pytest.approx(4.251722845131722, abs=1e-13)
    np.testing.assert_array_equal(np.isinf(curve), np.isinf(expected))
    np.testing.assert_allclose(curve, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("least", [5e-324, 1e-310, 1e-300, 1e-200, 1e-61])
@pytest.mark.parametrize("eps", [1e-4, 0.1])
def test_the_smallest_weights_give_finite_divergences(least, eps):
    hist = np.random.default_rng(0).integers(1, 50, 33).astype(float)
    hist[9] = 1e-30  # the loops cannot divide by less than 1e-308
    expected = reference.divergence_curve(hist, 3, eps)
    hist[9] = least
    curve = klquant.divergence_curve(hist, even_edges(33), num_quantized_bins=3, eps=eps)
    np.testing.assert_allclose(curve, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("eps", [1e-3, 0.01, 0.03])
def test_any_number_of_filled_bins_gives_an_accurate_curve(eps):
    """Many bins are summed by a series, and few are summed one by one. Both must be accurate at the limit."""
    num_bins = 65
    for filled in range(1, num_bins + 1):
        hist = np.zeros(num_bins, int)
        hist[np.arange(filled) * 27 % num_bins] = 1
        curve = klquant.divergence_curve(hist, even_edges(num_bins), num_quantized_bins=15, eps=eps)
        np.testing.assert_allclose(curve, reference.divergence_curve(hist, 15, eps), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("xp", "dtype"),
    [(NUMPY, "float16"), (NUMPY, "float32"), (NUMPY, "float64"), pytest.param(JAX, "float32", marks=needs_jax)],
)
def test_the_value_is_an_edge_in_the_dtype_of_the_edges(xp, dtype):
    hist, edges = np.array([1, 0, 2, 2, 2, 1, 1], dtype), (even_edges(7) * 0.3).astype(dtype)
    threshold = search(xp, hist, edges, num_quantized_bins=3)
    assert threshold.value.dtype == dtype
    assert np.asarray(threshold.value) == edges[7 // 2 + 1 + int(threshold.index) + 1]
    np.testing.assert_allclose(threshold.divergence, search(NUMPY, hist, num_quantized_bins=3).divergence, atol=1e-14)


def test_whole_edges_give_a_real_threshold():
    threshold = search(NUMPY, [1, 0, 2, 2, 2, 1, 1], np.arange(-7, 8, 2), num_quantized_bins=3)
    assert threshold.value.dtype == np.float64
    assert float(threshold) in (3, 5, 7)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "uint64", "float16", "float32", "float64"])
def test_the_dtype_of_the_counts_does_not_matter(dtype):
    hist = np.array([1, 0, 2, 250, 2, 1, 1])
    expected = search(NUMPY, hist, num_quantized_bins=3)
    threshold = search(NUMPY, hist.astype(dtype), num_quantized_bins=3)
    assert int(threshold.index) == int(expected.index)
    np.testing.assert_allclose(threshold.divergence, expected.divergence, rtol=0, atol=1e-14)


@needs_jax
def test_bfloat16_weights_keep_their_fractions():
    weights, edges = np.array([0.5, 1.5, 9, 1, 0.75, 4, 0.25]), even_edges(7)
    curve = klquant.divergence_curve(JAX.asarray(weights).astype("bfloat16"), JAX.asarray(edges), num_quantized_bins=3)
    expected = klquant.divergence_curve(weights, edges, num_quantized_bins=3)
    np.testing.assert_allclose(curve, expected, rtol=0, atol=1e-12)


def test_a_tail_behind_2_to_the_61_is_seen(xp):
    spike, tail = [0, 0, 0, 2**61, 0, 0, 0], [1, 0, 5, 2**61, 0, 4, 3]
    curves = [
        xp.call(klquant.divergence_curve, xp.asarray(h), xp.asarray(even_edges(7)), num_quantized_bins=3)
        for h in (spike, tail)
    ]
    np.testing.assert_array_equal(np.asarray(curves[0]), 0)
    assert (np.asarray(curves[1]) > 0).all()


def test_the_narrowest_histogram_has_one_candidate():
    threshold = search(NUMPY, [1, 2, 1], num_quantized_bins=3)
    assert (int(threshold.index), float(threshold.value)) == (0, 1.5)


def test_255_levels_are_the_default():
    assert klquant.divergence_curve(np.ones(257, int), even_edges(257)).shape == (2,)


@needs_jax
@pytest.mark.parametrize(
    "function",
    [
        klquant.optimal_threshold,
        klquant.divergence_curve,
    ],
)
def test_jit_needs_no_64_bit_configuration(function):
    import jax

    hist, edges = np.array([1, 0, 2, 2, 2, 1, 1]), even_edges(7)
    result = jax.jit(lambda h, e: function(h, e, num_quantized_bins=3))(JAX.asarray(hist), JAX.asarray(edges))
    expected = function(hist, edges, num_quantized_bins=3)
    for got, want in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-14)


@needs_jax
def test_vmap_searches_each_row():
    import jax

    hists = [[1, 0, 2, 2, 2, 1, 1], [9, 0, 2, 2, 0, 1, 8], [0, 0, 0, 0, 0, 0, 0]]
    edges = JAX.asarray(even_edges(7))
    with enable_x64():
        found = jax.vmap(lambda h: klquant.optimal_threshold(h, edges, num_quantized_bins=3))(JAX.asarray(hists))
    expected = [int(search(NUMPY, hist, num_quantized_bins=3).index) for hist in hists[:2]]
    assert np.asarray(found.index).tolist() == [*expected, -1]
    assert isnan(found.value[2])


@pytest.mark.parametrize("eps", [0.02, 0.05, 0.1, 0.4])
@pytest.mark.parametrize("filled", [[16], [15, 17], [10, 16, 20], [0, 32], [16, 17, 18, 30]])
def test_candidates_that_would_lose_a_whole_count_are_infeasible(xp, eps, filled):
    """The counts are large, so that only the rule eps1 < 1 decides, and no entry becomes negative."""
    hist = np.zeros(33, int)
    hist[filled] = 1000
    curve = xp.call(
        klquant.divergence_curve, xp.asarray(hist), xp.asarray(even_edges(33)), num_quantized_bins=5, eps=eps
    )
    expected = reference.divergence_curve(hist, 5, eps)
    np.testing.assert_array_equal(np.isinf(curve), np.isinf(expected))
    np.testing.assert_allclose(curve, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("xp", params(NUMPY, JAX, JIT))
def test_small_bins_behind_a_huge_one_keep_their_digits(xp):
    hist = np.random.default_rng(0).poisson(3, 1001)
    hist[200] = 2**58
    curve = xp.call(klquant.divergence_curve, xp.asarray(hist), xp.asarray(even_edges(1001)), num_quantized_bins=15)
    np.testing.assert_allclose(curve, reference.divergence_curve(hist, 15), rtol=0, atol=5e-14)


def laplace(num_bins, seed=0):
    hist, edges = klquant.histogram(np.random.default_rng(seed).laplace(size=20_000), num_bins=num_bins)
    hist[num_bins // 2] = 0
    return hist, edges


@pytest.mark.parametrize("tie_width", [0.0, 0.02, 0.5])
def test_near_ties_are_those_of_the_reference(xp, tie_width):
    hist, edges = laplace(257)
    found = search(xp, hist, edges, num_quantized_bins=63, tie_width=tie_width)
    curve, candidates = reference.divergence_curve(hist, 63), edges[257 // 2 + 63 // 2 + 1 :]
    near = candidates[reference.near_ties(curve, tie_width or 0.01)]
    assert (float(found.tie_low), float(found.tie_high)) == (near.min(), near.max())
    assert len(near) > 1
    value, index = reference.optimal_threshold(hist, edges, 63, tie_width=tie_width)
    assert (float(found.value), int(found.index)) == (value, index)
    assert float(found.divergence) == pytest.approx(curve[index], abs=1e-12)
    assert (index == int(np.argmin(curve))) == (tie_width == 0)


def test_each_histogram_of_a_batch_has_its_own_near_ties(xp):
    hists, edges = zip(*(laplace(101, seed) for seed in range(3)), strict=True)
    options = {"num_quantized_bins": 15, "tie_width": 0.1}
    batch = search(xp, np.stack(hists), np.stack(edges), **options)
    for k in range(3):
        one = search(NUMPY, hists[k], edges[k], **options)
        found = [float(vars(batch)[name][k]) for name in FIELDS]
        assert found == pytest.approx([float(vars(one)[name]) for name in FIELDS], abs=1e-12)


def test_a_lower_bound_holds_for_near_ties():
    hist, edges = laplace(257)
    free = search(NUMPY, hist, edges, num_quantized_bins=15, tie_width=5.0)
    bounded = search(NUMPY, hist, edges, num_quantized_bins=15, tie_width=5.0, min_ratio=0.5)
    assert free.tie_low < 0.5 * edges[-1] <= bounded.tie_low <= bounded.value


@pytest.mark.parametrize("criterion", [klquant.max_threshold, klquant.mse_threshold, klquant.percentile_threshold])
def test_other_criteria_have_no_near_ties(criterion):
    found = criterion(*laplace(257))
    assert (isnan(found.tie_low), isnan(found.tie_high)) == (True, True)


@pytest.mark.parametrize("tie_width", [-0.1, np.inf, np.nan])
def test_an_impossible_tie_width_is_refused(tie_width):
    with pytest.raises(klquant.InvalidInputError, match="`tie_width` must be 0 or positive, and finite, got"):
        search(NUMPY, *laplace(257), tie_width=tie_width)


def test_near_ties_need_equal_bins_only_to_be_resolved():
    hist, edges = laplace(257)
    edges = np.sign(edges) * np.abs(edges) ** 1.5
    assert search(NUMPY, hist, edges).tie_low > 0
    with pytest.raises(klquant.InvalidInputError, match="equally spaced for `tie_width`"):
        search(NUMPY, hist, edges, tie_width=0.01)


def test_of_many_candidates_without_loss_only_the_first_is_computed_again(monkeypatch):
    computed, compute = [], bin_by_bin.divergence_terms

    def count(search, chosen, filled, term, *, xp):
        computed.append(len(chosen.size))
        return compute(search, chosen, filled, term, xp=xp)

    monkeypatch.setattr(bin_by_bin, "divergence_terms", count)
    hist = np.zeros(2001, np.int64)
    hist[800:1201] = 7
    found = klquant.optimal_threshold(hist, even_edges(2001))
    assert found.divergence == 0
    assert found.tie_high > 2 * found.tie_low  # there are many
    assert computed == [1]
