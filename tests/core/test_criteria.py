import contextlib
import tracemalloc

import numpy as np
import pytest

import klquant
from klquant import InfeasibleError, InvalidInputError, reference
from support.cases import even_edges
from support.namespaces import ALL, JAX, JIT, NUMPY, needs_jax, params

HIST = np.array([1, 0, 3, 8, 20, 31, 2, 30, 22, 7, 0, 4, 1])
CRITERIA = [klquant.optimal_threshold, klquant.max_threshold, klquant.percentile_threshold, klquant.mse_threshold]
xp_all = pytest.mark.parametrize("xp", ALL)


def call(xp, function, hist, edges=None, **options):
    edges = even_edges(np.shape(hist)[-1]) if edges is None else edges
    return xp.call(function, xp.asarray(hist), xp.asarray(edges), **{"num_quantized_bins": 5, **options})


@xp_all
def test_max_is_the_edge_of_the_outermost_bin_that_is_not_empty(xp):
    found = call(xp, klquant.max_threshold, np.pad(HIST, 3))
    assert float(found) == 6.5
    assert float(found.clipped) == 0
    assert int(found.index) == -1
    assert np.isnan(found.divergence)


@xp_all
@pytest.mark.parametrize(("percentile", "expected"), [(50, 2.75), (75, 4.625), (100, 7.0), (20, 1.25)])
def test_percentiles_are_linear_inside_the_bin(xp, percentile, expected):
    hist, edges = [1, 3, 2, 0, 2, 1, 1], np.array([-7, -5, -2, -0.5, 0.5, 2, 5, 7])
    # by |x|: 0 of 10 below 0.5, 4 to 2, 4 to 5, 2 to 7
    found = call(xp, klquant.percentile_threshold, hist, edges, num_quantized_bins=3, percentile=percentile)
    assert float(found) == pytest.approx(expected, rel=1e-12)
    assert float(found.clipped) == pytest.approx(1 - percentile / 100, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("xp", params(JAX, JIT))
@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.99])
def test_percentiles_are_the_same_to_the_last_bit(xp, percentile):
    batch, edges = np.random.default_rng(0).integers(0, 1000, (500, 101)), even_edges(101) * 0.017
    expected = call(NUMPY, klquant.percentile_threshold, batch, edges, percentile=percentile)
    found = call(xp, klquant.percentile_threshold, batch, edges, percentile=percentile)
    np.testing.assert_array_equal(np.asarray(found.value), expected.value)


@xp_all
def test_the_squared_errors_are_those_of_the_reference(xp):
    edges = even_edges(13) * 0.3
    curve = call(xp, klquant.mse_curve, HIST, edges)
    np.testing.assert_allclose(curve, reference.squared_errors(HIST, edges, 5), rtol=0, atol=1e-13)
    found = call(xp, klquant.mse_threshold, HIST, edges)
    assert int(found.index) == np.argmin(curve)
    assert float(found) == edges[13 // 2 + 1 + int(found.index)]


@xp_all
@pytest.mark.parametrize(("dtype", "amax"), [(np.float16, 40_000), (np.float32, 3e38)])
def test_the_range_may_be_wider_than_its_dtype_can_hold(xp, dtype, amax):
    """From -amax to amax it is 2 amax, which would be infinite in the dtype of the edges."""
    edges = (even_edges(13) / even_edges(13)[-1] * amax).astype(dtype)
    expected = call(xp, klquant.mse_threshold, HIST, even_edges(13))
    assert int(call(xp, klquant.mse_threshold, HIST, edges).index) == int(expected.index) > 0


@pytest.mark.parametrize(("dtype", "amax"), [(np.float16, 40_000), (np.float32, 3e38)])
def test_so_it_may_be_where_near_ties_are_decided_by_the_squared_error(dtype, amax):
    options = {"tie_width": 0.5, "num_quantized_bins": 5}
    expected = klquant.optimal_threshold(HIST, even_edges(13), **options)
    found = klquant.optimal_threshold(HIST, (even_edges(13) / even_edges(13)[-1] * amax).astype(dtype), **options)
    assert int(found.index) == int(expected.index) > 0


@xp_all
def test_sqnr_is_the_ratio_of_signal_to_expected_error(xp):
    edges = even_edges(13)
    centres = (edges[1:] + edges[:-1]) / 2
    found = call(xp, klquant.mse_threshold, HIST, edges)
    signal = (HIST * centres**2).sum() / HIST.sum()
    error = reference.squared_errors(HIST, edges, 5).min()
    assert float(found.sqnr_db) == pytest.approx(10 * np.log10(signal / error), rel=1e-12)


@xp_all
@pytest.mark.parametrize("width", [1.0, 0.1, 2 / 33])
def test_values_on_a_level_up_to_rounding_have_no_error(xp, width):
    hist = np.zeros(33, np.int64)
    hist[10] = 1
    found = call(xp, klquant.mse_threshold, hist, even_edges(33) * width, num_quantized_bins=15)
    assert float(found.sqnr_db) == np.inf


@xp_all
@pytest.mark.parametrize(("dtype", "count"), [("uint8", 200), ("int8", 100), ("int32", 2**30 + 1), ("float16", 4e4)])
def test_folding_narrow_counts_does_not_overflow(xp, dtype, count):
    hist = np.full(7, count)
    expected = reference.one_sided_divergence_curve(hist, 3)
    np.testing.assert_array_equal(reference.one_sided_divergence_curve(hist.astype(dtype), 3), expected)
    curve = call(xp, klquant.divergence_curve, hist.astype(dtype), num_quantized_bins=3, one_sided=True)
    np.testing.assert_allclose(curve, expected, rtol=0, atol=1e-12)
    assert expected[0] == pytest.approx(0.0944, abs=1e-4) or dtype != "uint8"  # 0.1427 if the sums wrap around


@xp_all
@pytest.mark.parametrize("num_bins", [3, 5, 9])
def test_two_levels_on_one_side_have_no_interior_group(xp, num_bins):
    hist = np.random.default_rng(num_bins).integers(1, 9, num_bins)
    curve = call(xp, klquant.divergence_curve, hist, num_quantized_bins=3, one_sided=True)
    np.testing.assert_allclose(curve, reference.one_sided_divergence_curve(hist, 3), rtol=0, atol=1e-12)


@xp_all
@pytest.mark.parametrize("num_bins", [5, 13, 41])
def test_the_one_sided_curve_is_that_of_the_reference(xp, num_bins):
    hist = np.random.default_rng(num_bins).integers(0, 9, num_bins)
    curve = call(xp, klquant.divergence_curve, hist, one_sided=True)
    expected = reference.one_sided_divergence_curve(hist, 5)
    np.testing.assert_array_equal(np.isinf(curve), np.isinf(expected))
    np.testing.assert_allclose(curve, expected, rtol=0, atol=1e-12)


@xp_all
@pytest.mark.parametrize("num_bins", [13, 41])
def test_the_one_sided_threshold_is_that_of_the_reference(xp, num_bins):
    hist, edges = np.random.default_rng(num_bins).integers(0, 9, num_bins), even_edges(num_bins)
    found = call(xp, klquant.optimal_threshold, hist, one_sided=True)
    expected = reference.one_sided_divergence_curve(hist, 5)
    assert int(found.index) == np.argmin(expected)
    assert float(found) == edges[len(edges) - len(expected) + int(found.index)]
    assert float(found.divergence) == pytest.approx(expected.min(), abs=1e-12)


@xp_all
def test_a_floor_excludes_narrower_candidates(xp):
    hist, edges = np.array([0, 0, 0, 1, 0, 0, 5, 100, 100, 0, 30, 100, 30]), even_edges(13)
    free = call(xp, klquant.optimal_threshold, hist, edges)
    floored = call(xp, klquant.optimal_threshold, hist, edges, min_ratio=0.6)
    assert float(free) < 0.6 * edges[-1] <= float(floored)
    curve = reference.divergence_curve(hist, 5)
    allowed = np.where(edges[-len(curve) :] >= 0.6 * edges[-1], curve, np.inf)
    assert int(floored.index) == np.argmin(allowed) == 3


@xp_all
@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_batch_gives_what_its_histograms_give_alone(xp, criterion):
    batch = np.random.default_rng(1).integers(0, 50, (2, 3, 13))
    edges = even_edges(13) * np.arange(1, 7).reshape(2, 3, 1)
    together = call(xp, criterion, batch, edges)
    shared = call(xp, criterion, batch, even_edges(13))
    assert together.value.shape == together.clipped.shape == (2, 3)
    for where in np.ndindex(2, 3):
        alone = call(xp, criterion, batch[where], edges[where])
        for name, field in vars(together).items():
            np.testing.assert_array_equal(np.asarray(field)[where], getattr(alone, name), err_msg=name)
        np.testing.assert_array_equal(np.asarray(shared.index)[where], alone.index)


@xp_all
def test_a_batch_of_curves_is_the_curves(xp):
    batch = np.random.default_rng(1).integers(0, 50, (4, 13))
    for curve in (klquant.divergence_curve, klquant.mse_curve):
        curves = call(xp, curve, batch)
        np.testing.assert_array_equal(curves, np.stack([call(xp, curve, hist) for hist in batch]))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_an_empty_histogram_of_a_batch_is_named(criterion):
    batch = np.stack([HIST, HIST * 0, HIST])
    with pytest.raises(InfeasibleError, match=r"histograms \[1\] of the batch"):
        call(NUMPY, criterion, batch)
    with pytest.raises(InfeasibleError, match=r"`hist` must have .+, got "):
        call(NUMPY, criterion, HIST * 0)


def test_the_error_lists_at_most_ten_empty_histograms():
    with pytest.raises(InfeasibleError, match=r"histograms \[0, 1, 2, 3, 4, 5, 6, 7, 8, 9\] of the batch"):
        call(NUMPY, klquant.max_threshold, np.zeros((12, 13), int))


@needs_jax
@pytest.mark.parametrize("criterion", CRITERIA)
def test_under_jit_an_empty_histogram_has_no_threshold_and_no_index(criterion):
    found = call(JIT, criterion, HIST * 0)
    assert np.isnan(found.value)
    assert int(found.index) == -1


@xp_all
def test_mse_may_choose_the_narrowest_of_all(xp):
    found = call(xp, klquant.mse_threshold, [0, 0, 0, 5, 0, 0, 0])
    assert (float(found), int(found.index)) == (0.5, 0)


@pytest.mark.parametrize("levels", [15, 31, 255, 1023])
def test_levels_are_a_parameter(levels):
    hist = np.random.default_rng(2).poisson(20, 2047)
    curve = klquant.divergence_curve(hist, even_edges(2047), num_quantized_bins=levels)
    np.testing.assert_allclose(
        curve[:40], reference.divergence_curve(hist[: len(hist)], levels)[:40], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("percentile", [0, -1, 101, float("nan")])
def test_a_percentile_outside_its_range_is_refused(percentile):
    with pytest.raises(InvalidInputError, match="`percentile` must be above 0 and at most 100"):
        call(NUMPY, klquant.percentile_threshold, HIST, percentile=percentile)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_a_floor_outside_its_range_is_refused(ratio):
    with pytest.raises(InvalidInputError, match="`min_ratio` must lie between 0 and 1"):
        call(NUMPY, klquant.optimal_threshold, HIST, min_ratio=ratio)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_255_levels_are_the_default(criterion):
    hist, edges = np.random.default_rng(4).poisson(20, 401), even_edges(401)
    np.testing.assert_equal(criterion(hist, edges), criterion(hist, edges, num_quantized_bins=255))


@pytest.mark.parametrize(("stretched", "accepted"), [(1.005, True), (1.02, False)])
def test_bins_may_differ_by_a_hundredth(stretched, accepted):
    edges = even_edges(1001)
    edges[0], edges[-1] = edges[1] - stretched, edges[-2] + stretched
    with contextlib.nullcontext() if accepted else pytest.raises(InvalidInputError, match="equally spaced"):
        klquant.mse_threshold(np.ones(1001, int), edges)


def test_bins_of_different_widths_are_refused_by_mse():
    edges = even_edges(13)
    edges[-1], edges[0] = 9, -9
    with pytest.raises(InvalidInputError, match="`edges` must be equally spaced"):
        call(NUMPY, klquant.mse_threshold, HIST, edges)


@xp_all
@pytest.mark.parametrize("levels", [255, 1023])
def test_squared_errors_are_summed_in_blocks(xp, levels, monkeypatch):
    """More levels than a block has rows give the same errors."""
    hist, edges = np.random.default_rng(2).poisson(20, 1023), even_edges(1023)
    expected = klquant.mse_curve(hist, edges, num_quantized_bins=levels)
    monkeypatch.setattr("klquant._search.squared_errors.BLOCK_SIZE", 20 * 512 + 3)

    def curve(h, e):  # a new function, so a new trace
        return klquant.mse_curve(h, e, num_quantized_bins=levels)

    found = xp.call(curve, xp.asarray(hist), xp.asarray(edges))
    square = (hist * (edges[1:] + edges[:-1]) ** 2).sum() / 4 / hist.sum()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14 * square)  # exact relative to the mean square


def test_memory_of_squared_errors_grows_with_the_bins_only():
    hist, edges = np.random.default_rng(2).poisson(20, 8193), even_edges(8193)
    tracemalloc.start()
    klquant.mse_threshold(hist, edges, num_quantized_bins=2047)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * 2**20  # all levels at once take 96 MiB
