import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import klquant
from klquant import InfeasibleError, reference
from klquant.testing import COUNT_SHAPES, assert_optimal, histograms
from strategies import EPS, JAX_SIZES, even_edges, fewer
from support.namespaces import JAX, JIT, NUMPY, READ_ONLY, needs_jax, params


def curve_of(case, xp=NUMPY):
    hist, edges = xp.asarray(case.hist), xp.asarray(case.edges)
    curve = xp.call(klquant.divergence_curve, hist, edges, num_quantized_bins=case.num_quantized_bins)
    return np.asarray(curve)


def threshold_of(case, xp=NUMPY):
    """Return the threshold, or None if no candidate is feasible."""
    hist, edges = xp.asarray(case.hist), xp.asarray(case.edges)
    try:
        found = xp.call(klquant.optimal_threshold, hist, edges, num_quantized_bins=case.num_quantized_bins)
    except InfeasibleError:
        return None
    return None if xp.is_traced and int(found.index) == -1 else found


def assert_found_like_the_reference(found, curve):
    """Compare by regret: if two candidates are equal within rounding, either may be chosen."""
    if not np.isfinite(curve).any():
        assert found is None
        return
    assert curve[int(found.index)] - curve.min() <= 1e-15
    assert abs(float(found.divergence) - curve.min()) <= 1e-12


@given(histograms())
def test_the_curve_is_that_of_the_reference(case):
    expected = reference.divergence_curve(case.hist, case.num_quantized_bins)
    curve = curve_of(case)
    np.testing.assert_array_equal(np.isinf(curve), np.isinf(expected))
    np.testing.assert_allclose(curve, expected, rtol=0, atol=1e-12)


@given(histograms(), EPS)
def test_the_curve_is_that_of_the_reference_for_any_eps(case, eps):
    expected = reference.divergence_curve(case.hist, case.num_quantized_bins, eps)
    curve = klquant.divergence_curve(case.hist, case.edges, num_quantized_bins=case.num_quantized_bins, eps=eps)
    np.testing.assert_array_equal(np.isinf(curve), np.isinf(expected))
    np.testing.assert_allclose(curve, expected, rtol=0, atol=1e-12)


@given(histograms(shapes=["rounded_weights"]))
def test_weights_with_rounded_sums_keep_their_digits(case):
    expected = reference.divergence_curve(case.hist, case.num_quantized_bins)
    np.testing.assert_allclose(curve_of(case), expected, rtol=0, atol=1e-12)


@given(histograms(shapes=["dense", "sparse", "comb", "few_samples"]), st.integers(1, 3), st.floats(0.05, 1.5))
def test_smoothing_may_take_much_of_each_bin(case, least, loss):
    """The widest candidate loses about `loss` in every bin, which is feasible below 1 and below the smallest count."""
    hist = np.minimum(case.hist, 3) * least
    nonzeros = np.count_nonzero(hist)
    assume(0 < nonzeros < len(hist))
    eps = loss * nonzeros / (len(hist) - nonzeros)
    expected = reference.divergence_curve(hist, case.num_quantized_bins, eps)
    curve = klquant.divergence_curve(hist, case.edges, num_quantized_bins=case.num_quantized_bins, eps=eps)
    np.testing.assert_array_equal(np.isinf(curve), np.isinf(expected))
    np.testing.assert_allclose(curve, expected, rtol=0, atol=1e-12)


@given(st.sampled_from([(15, 3), (33, 15), (101, 15)]), st.data())
def test_weights_of_many_magnitudes_keep_their_digits(size, data):
    """A group may hold next to nothing beside the outliers."""
    num_bins, levels = size
    exponents = data.draw(npst.arrays(np.float64, num_bins, elements=st.floats(-15, 3)))
    expected = reference.divergence_curve(10.0**exponents, levels, 1e-25)
    curve = klquant.divergence_curve(10.0**exponents, even_edges(num_bins, 1.0), num_quantized_bins=levels, eps=1e-25)
    np.testing.assert_allclose(curve, expected, rtol=0, atol=1e-12)


@given(histograms())
def test_the_minimum_is_that_of_the_reference(case):
    found, levels = threshold_of(case), case.num_quantized_bins
    assert_optimal(None if found is None else found.index, case.hist, num_quantized_bins=levels)
    assert_found_like_the_reference(found, reference.divergence_curve(case.hist, levels))


@needs_jax
@pytest.mark.parametrize("shapes", [COUNT_SHAPES, ["weights"]], ids=["counts", "weights"])
@fewer()
@given(data=st.data())
def test_compiled_code_computes_the_curve_of_numpy(shapes, data):
    case = data.draw(histograms(sizes=JAX_SIZES, shapes=shapes))
    expected, curve = curve_of(case), curve_of(case, JIT)
    np.testing.assert_array_equal(np.isinf(curve), np.isinf(expected))
    np.testing.assert_allclose(curve, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("xp", params(JAX, JIT))
@fewer()
@given(case=histograms(sizes=JAX_SIZES, shapes=COUNT_SHAPES))
def test_jax_finds_the_minimum_of_the_reference(xp, case):
    found = threshold_of(case, xp)
    assert_found_like_the_reference(found, reference.divergence_curve(case.hist, case.num_quantized_bins))
    if found is not None:
        assert np.asarray(found.value) in case.edges


@given(histograms())
def test_the_threshold_is_an_edge_on_the_right(case):
    found = threshold_of(case)
    assume(found is not None)
    num_bins, narrowest = len(case.hist), case.num_quantized_bins // 2
    assert 0 <= int(found.index) <= num_bins // 2 - narrowest
    assert found.value == case.edges[num_bins // 2 + narrowest + int(found.index) + 1]
    assert found.value > 0


@given(histograms())
def test_divergences_are_never_negative_nor_nan(case):
    assert (curve_of(case) >= 0).all()


@given(histograms(), st.integers(-40, 40))
def test_powers_of_two_scale_the_threshold_exactly(case, exponent):
    scaled = case._replace(edges=case.edges * 2.0**exponent)
    assert curve_of(scaled).tobytes() == curve_of(case).tobytes()
    found, found_scaled = threshold_of(case), threshold_of(scaled)
    assume(found is not None)
    assert found_scaled.value == found.value * 2.0**exponent
    assert found_scaled.index == found.index
    assert found_scaled.divergence == found.divergence


@given(histograms(shapes=COUNT_SHAPES))
def test_whole_weights_are_counts(case):
    assume(case.hist.sum() < 2**50)
    as_weights = case._replace(hist=case.hist.astype(np.float64))
    np.testing.assert_allclose(curve_of(as_weights), curve_of(case), rtol=0, atol=1e-13)


@given(histograms(shapes=COUNT_SHAPES), st.integers(1, 10))
def test_counts_and_eps_scaled_together_give_the_same_divergences(case, exponent):
    times = 2**exponent
    assume(int(case.hist.sum()) * times < 2**63)
    curve = curve_of(case._replace(hist=case.hist * times))
    same = klquant.divergence_curve(case.hist, case.edges, num_quantized_bins=case.num_quantized_bins, eps=1e-4 / times)
    feasible = np.isfinite(curve)  # fewer than in `same`, because the rule eps1 < 1 does not scale
    np.testing.assert_allclose(curve[feasible], same[feasible], rtol=0, atol=1e-12)


@given(histograms())
def test_inputs_stay_bit_for_bit_and_may_be_read_only(case):
    before = case.hist.tobytes(), case.edges.tobytes()
    found, curve = threshold_of(case), curve_of(case)
    assert (case.hist.tobytes(), case.edges.tobytes()) == before
    assert curve_of(case, READ_ONLY).tobytes() == curve.tobytes()
    again = threshold_of(case, READ_ONLY)
    fields = ("value", "index", "divergence", "clipped", "sqnr_db")
    assert (found is None) == (again is None)
    assert found is None or all(getattr(found, f).tobytes() == getattr(again, f).tobytes() for f in fields)


@given(histograms(), st.integers(1, 5), st.booleans())
def test_empty_outer_bins_change_no_inner_candidate(case, more, one_sided):
    width, levels = 2.0 / len(case.hist), case.num_quantized_bins
    assume(levels > 3 or not one_sided)
    edges = [even_edges(len(case.hist) + 2 * k, 1 + k * width) for k in (0, more)]
    options = {"num_quantized_bins": levels, "one_sided": one_sided}
    curve = klquant.divergence_curve(case.hist, edges[0], **options)
    padded = klquant.divergence_curve(np.pad(case.hist, more), edges[1], **options)[: len(curve)]
    np.testing.assert_array_equal(np.isinf(curve), np.isinf(padded))
    np.testing.assert_allclose(padded, curve, rtol=0, atol=1e-12)


@given(histograms())
def test_a_one_sided_search_does_not_see_the_sign(case):
    options = {"num_quantized_bins": case.num_quantized_bins, "one_sided": True}
    edges = even_edges(len(case.hist), 1.0)
    curve, mirrored = (klquant.divergence_curve(h, edges, **options) for h in (case.hist, case.hist[::-1]))
    np.testing.assert_array_equal(curve, mirrored)


@given(histograms(sizes=[(15, 3), (33, 3), (33, 15)]), st.data())
def test_of_candidates_without_any_loss_the_first_wins(case, data):
    """All mass lies in one bin near the centre, so P = Q for several candidates."""
    hist, half = np.zeros(len(case.hist), np.int64), case.num_quantized_bins // 2
    hist[len(hist) // 2 + data.draw(st.integers(1 - half, half))] = data.draw(st.integers(1, 1000))
    lossless = np.flatnonzero(reference.divergence_curve(hist, case.num_quantized_bins) == 0)
    assume(lossless.size)
    found = klquant.optimal_threshold(hist, case.edges, num_quantized_bins=case.num_quantized_bins)
    assert (int(found.index), float(found.divergence)) == (lossless[0], 0)


@given(histograms(shapes=COUNT_SHAPES), st.data())
def test_a_floor_on_an_edge_admits_that_edge(case, data):
    curve = reference.divergence_curve(case.hist, case.num_quantized_bins)
    first = data.draw(st.integers(0, len(curve) - 1))
    assume(np.isfinite(curve[first:]).any())
    candidates = case.edges[-len(curve) :]
    ratio = float(candidates[first] / case.edges[-1])
    assume(ratio * case.edges[-1] == candidates[first])
    found = klquant.optimal_threshold(
        case.hist, case.edges, num_quantized_bins=case.num_quantized_bins, min_ratio=ratio
    )
    assert int(found.index) >= first
    assert curve[int(found.index)] - curve[first:].min() <= 1e-15


@given(histograms(shapes=COUNT_SHAPES), st.lists(st.floats(0, 1), min_size=2, max_size=4).map(sorted))
def test_higher_floors_give_wider_thresholds(case, ratios):
    found = []
    for ratio in ratios:
        try:
            options = {"num_quantized_bins": case.num_quantized_bins, "min_ratio": ratio}
            found.append(float(klquant.optimal_threshold(case.hist, case.edges, **options)))
        except InfeasibleError:
            break
    assert found == sorted(found)


@given(histograms(sizes=[(15, 5), (33, 5), (33, 15)]))
def test_the_one_sided_minimum_is_that_of_the_reference(case):
    curve = reference.one_sided_divergence_curve(case.hist, case.num_quantized_bins)
    assume(np.isfinite(curve).any())
    options = {"num_quantized_bins": case.num_quantized_bins, "one_sided": True}
    found = klquant.optimal_threshold(case.hist, case.edges, **options)
    assert_found_like_the_reference(found, curve)
    assert float(found.value) == case.edges[len(case.edges) - len(curve) + int(found.index)]


@pytest.mark.parametrize("xp", params(NUMPY, JAX))
@fewer()
@given(case=histograms(sizes=JAX_SIZES), tie_width=st.sampled_from([0.0, 0.01, 0.5]))
def test_near_ties_are_those_of_the_reference(xp, case, tie_width):
    """Compare by regret: candidates at the limit may be in or out."""
    levels, case = case.num_quantized_bins, case._replace(edges=even_edges(len(case.hist), 4.0))
    curve = reference.divergence_curve(case.hist, levels)
    assume(np.isfinite(curve).any())
    arrays = xp.asarray(case.hist), xp.asarray(case.edges)
    found = klquant.optimal_threshold(*arrays, num_quantized_bins=levels, tie_width=tie_width)
    found = klquant.Threshold(**{key: np.asarray(value) for key, value in vars(found).items()})
    limit = curve.min() * (1 + (tie_width or 0.01))
    sure, possible = (np.flatnonzero(curve <= limit + slack) for slack in (-1e-11, 1e-11))
    candidates = case.edges[-len(curve) :]
    within = [*sure, int(np.argmin(curve))]
    assert candidates[possible[0]] <= found.tie_low <= candidates[min(within)] or curve.min() < 1e-11
    assert candidates[max(within)] <= found.tie_high <= candidates[possible[-1]] or curve.min() < 1e-11
    assert found.tie_low <= found.value <= found.tie_high
    if tie_width:
        errors = reference.squared_errors(case.hist, case.edges, levels)[-len(curve) :]
        square = (case.hist * (case.edges[1:] + case.edges[:-1]) ** 2).sum() / 4 / case.hist.sum()
        assert int(found.index) in possible
        assert errors[int(found.index)] <= errors[within].min() + 1e-9 * square
    else:
        assert_found_like_the_reference(found, curve)
