"""JAX's transformations and modes: bad values under jit, several devices, strict promotion."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import klquant
from klquant import reference
from support.cases import even_edges
from support.namespaces import JAX, JIT, NUMPY, enable_x64, needs_jax

pytestmark = needs_jax
HIST, EDGES = np.array([1.0, 0, 3, 8, 20, 31, 2, 30, 22, 7, 0, 4, 1]), even_edges(13)
CRITERIA = [klquant.optimal_threshold, klquant.max_threshold, klquant.percentile_threshold, klquant.mse_threshold]
CURVES = [klquant.divergence_curve, klquant.mse_curve]
BAD = pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0], ids=["NaN", "infinite", "negative"])


def with_entry(values, entry):
    return np.where(np.arange(len(values)) == 3, entry, values)


def jitted(function, *arrays, **static):
    return JIT.call(function, *map(JAX.asarray, arrays), **static)


@BAD
@pytest.mark.parametrize("criterion", CRITERIA)
def test_bad_counts_have_no_threshold(criterion, bad):
    found = jitted(criterion, with_entry(HIST, bad), EDGES, num_quantized_bins=5)
    assert np.isnan([found.value, found.divergence, found.clipped, found.sqnr_db]).all()
    assert int(found.index) == -1
    batch = np.stack([with_entry(HIST, bad), HIST])
    both = jitted(criterion, batch, EDGES, num_quantized_bins=5)
    assert np.isnan(both.value).tolist() == [True, False]


@BAD
@pytest.mark.parametrize("curve", CURVES)
def test_bad_counts_have_no_curve(curve, bad):
    assert np.isnan(jitted(curve, with_entry(HIST, bad), EDGES, num_quantized_bins=5)).all()


def test_bad_counts_cannot_cancel_in_a_one_sided_search():
    curve = jitted(klquant.divergence_curve, with_entry(HIST, -1.0), EDGES, num_quantized_bins=5, one_sided=True)
    assert np.isnan(curve).all()


@pytest.mark.parametrize("function", [*CRITERIA, *CURVES])
def test_edges_that_are_not_finite_give_nan(function):
    found = jitted(function, HIST, with_entry(np.append(EDGES[:-1], EDGES[-1]), np.nan), num_quantized_bins=5)
    assert np.isnan(found.value if isinstance(found, klquant.Threshold) else found).all()


REFUSED_EDGES = {
    "decreasing": EDGES[::-1],
    "not symmetric": EDGES + 1e-5,
    "all zero": 0 * EDGES,
    "tiny": EDGES * 1e-160,
    "huge": EDGES * 1e160,
    "infinite": np.r_[-np.inf, EDGES[1:-1], np.inf],
}


@pytest.mark.parametrize("edges", REFUSED_EDGES.values(), ids=REFUSED_EDGES)
@pytest.mark.parametrize("function", [*CRITERIA, *CURVES])
def test_edges_that_are_refused_give_nan_if_they_are_traced(function, edges):
    with pytest.raises(klquant.InvalidInputError, match="`edges`"):
        function(HIST, edges, num_quantized_bins=5)
    found = jitted(function, HIST, edges, num_quantized_bins=5)
    assert np.isnan(found.value if isinstance(found, klquant.Threshold) else found).all()


def test_edges_that_rounding_made_uneven_are_valid():
    """The checks allow for the rounding of ``linspace`` in the dtype of the edges."""
    edges = np.linspace(-3.7, 3.7, 14, dtype=np.float32)
    edges[2] = np.nextafter(edges[2], np.float32(0))
    for function in CRITERIA[1:]:
        found = jitted(function, HIST, edges, num_quantized_bins=5)
        assert float(found.value) == pytest.approx(float(function(HIST, edges, num_quantized_bins=5).value), rel=1e-6)


@pytest.mark.parametrize("options", [{"tie_width": 0.1}, {}], ids=["tie_width", "mse"])
def test_bins_of_unequal_width_have_no_squared_error(options):
    function = klquant.optimal_threshold if options else klquant.mse_threshold
    uneven = EDGES * np.abs(EDGES)
    found = jitted(function, np.stack([HIST, HIST]), np.stack([EDGES, uneven]), num_quantized_bins=5, **options)
    assert np.isnan(found.value).tolist() == [False, True]
    assert found.index[1] == -1
    expected = function(HIST, EDGES, num_quantized_bins=5, **options)
    assert float(found.value[0]) == float(expected.value)


def test_histograms_that_cannot_be_merged_have_nan_edges():
    def merged(hist, other, edges, other_edges):
        return klquant.merge(klquant.Histogram(hist, edges), klquant.Histogram(other, other_edges))

    count, edges = np.array([1, 2, 3]), even_edges(3)
    hist, found = jitted(merged, count, count, edges, edges)
    np.testing.assert_array_equal(hist, 2 * count)
    np.testing.assert_array_equal(found, edges)
    for bad in (-count, np.full(3, 2**62 + 1), np.full(3, np.nan), np.full(3, np.inf)):
        assert np.isnan(jitted(merged, bad, bad, edges, edges).edges).all()
    assert np.isnan(jitted(merged, count, count, edges, 2 * edges).edges).all()
    batch = jitted(merged, *[np.stack([count, count])] * 2, np.stack([edges, edges]), np.stack([edges, 2 * edges]))
    assert np.isnan(batch.edges).all(axis=1).tolist() == [False, True]
    shared = jitted(merged, np.stack([count, -count]), np.stack([count, count]), edges, edges)
    assert np.isnan(shared.edges).all()


CONSTANTS = {
    "histogram": lambda x: klquant.histogram(x, num_bins=5),
    "merge": lambda x: klquant.merge(*[klquant.histogram(x, num_bins=5)] * 2),
    "quantize": lambda x: klquant.quantize(x, 0.5),
    "threshold": lambda x: klquant.optimal_threshold(*klquant.histogram(x, num_bins=5), num_quantized_bins=3, eps=1e-3),
    "percentile": lambda x: klquant.percentile_threshold(*klquant.histogram(x, num_bins=5), num_quantized_bins=3),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_of_a_traced_function_stay_constants(name):
    """They are computed at once, and the checks see their values."""
    import jax

    x, bad, seen = JAX.asarray(np.linspace(-1, 1, 7)), JAX.asarray(np.full(7, np.nan)), []

    def function(y):
        seen.extend(jax.tree.leaves(CONSTANTS[name](x)))
        return y

    for transformed in (jax.jit(function), jax.vmap(function), jax.jit(jax.vmap(function))):
        seen.clear()
        transformed(JAX.asarray(np.ones(2)))
        expected = jax.tree.leaves(CONSTANTS[name](x))
        for found, wanted in zip(seen, expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
    with pytest.raises(klquant.InvalidInputError, match="`x` must"):
        jax.jit(lambda y: (CONSTANTS[name](bad), y))(1.0)


@pytest.mark.parametrize("function", [klquant.divergence_curve, klquant.mse_curve])
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_mapped_rows_inside_jit_need_no_64_bit_types(function, dtype):
    import jax

    hists, edges = np.stack([HIST, HIST[::-1], np.roll(HIST, 3)]).astype(dtype), EDGES.astype(np.float32)
    rows = jax.vmap(lambda h: function(h, jax.numpy.asarray(edges), num_quantized_bins=5))
    found = jax.jit(jax.vmap(rows))(jax.numpy.asarray(hists)[None])
    expected = [function(hist, edges, num_quantized_bins=5) for hist in hists]
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-12)


@BAD
def test_bad_values_of_the_steps_give_nan(bad):
    values = with_entry(HIST, bad)
    assert np.isnan(jitted(klquant.smooth, values)).all()
    assert np.isnan(jitted(klquant.kl_divergence, values, HIST))
    assert np.isnan(jitted(klquant.kl_divergence, HIST, values))
    assert np.isnan(jitted(klquant.quantized_distribution, values, HIST, num_quantized_bins=3)).all()
    assert np.isnan(jitted(klquant.quantized_distribution, HIST, values, num_quantized_bins=3)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_data_that_are_not_finite_have_nan_edges(bad):
    x = np.array([[1.0, bad, 2.0], [1.0, 3.0, 2.0]])
    hist, edges = jitted(klquant.histogram, x, num_bins=13, amax=4.0)
    assert np.isnan(edges).all()
    assert np.isnan(jitted(klquant.optimal_threshold, hist, edges, num_quantized_bins=5).value)
    by_row = jitted(klquant.histogram, x, num_bins=5, amax=4.0, axis=0)
    assert np.isnan(by_row.edges).all(axis=1).tolist() == [True, False]
    np.testing.assert_array_equal(by_row.hist[1], klquant.histogram(x[1], num_bins=5, amax=4.0).hist)


def test_fake_quantize_keeps_nan_and_quantize_makes_it_0():
    x, one = np.array([np.nan, 0.7, -9.0], np.float32), np.float32(0.5)
    np.testing.assert_array_equal(jitted(klquant.fake_quantize, x, one), np.array([np.nan, 0.5, -9.0], np.float32))
    np.testing.assert_array_equal(jitted(klquant.quantize, x, one), [0, 1, -18])


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0, 1e-50, 1e39])
def test_bad_scales_give_nan(scale):
    x = np.array([1.0, 2.0], np.float32)
    assert np.isnan(jitted(klquant.fake_quantize, x, np.float64(scale))).all()
    assert np.isnan(jitted(klquant.dequantize, np.array([1, 2], np.int8), np.float64(scale))).all()
    wide = jitted(klquant.fake_quantize, x.astype(np.float64), np.float64(scale))
    assert np.isnan(wide).all() == (not 0 < scale < np.inf)


def test_a_negative_threshold_has_no_scale():
    np.testing.assert_array_equal(jitted(klquant.scale, np.array([127.0, -1.0, 0.0])), [1, np.nan, 0])


def test_weights_far_below_the_others_keep_their_digits():
    hist = np.random.default_rng(0).integers(1, 50, 33).astype(float)
    for tiny in (1e-40, 1e-200):
        hist[7] = tiny
        curve = jitted(klquant.divergence_curve, hist, even_edges(33), num_quantized_bins=3)
        np.testing.assert_allclose(curve, reference.divergence_curve(hist, 3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tiny", [1e-45, 1e-40, 5e-324, 1e-310])
def test_subnormal_weights_are_not_zero(tiny):
    """XLA computes with 0 in place of a subnormal number; a zero would be smoothed."""
    hist = np.random.default_rng(1).integers(1, 50, 13).astype(np.float32 if tiny > 1e-50 else np.float64)
    hist[4] = tiny
    for function in (klquant.divergence_curve, klquant.mse_curve):
        found, expected = (
            jitted(function, hist, EDGES, num_quantized_bins=5),
            function(hist, EDGES, num_quantized_bins=5),
        )
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    filled = jitted(klquant.quantized_distribution, np.ones(13), hist, num_quantized_bins=5)
    np.testing.assert_array_equal(filled, np.ones(13))
    assert np.isnan(jitted(klquant.divergence_curve, with_entry(hist, -tiny), EDGES, num_quantized_bins=5)).all()


@pytest.mark.parametrize("amax", [1e-38, 3e-44])
def test_subnormal_values_and_edges(amax):
    x = (np.linspace(-1, 1, 41) * amax).astype(np.float32)
    found, expected = (call(klquant.histogram, x, num_bins=13, amax=amax) for call in (jitted, NUMPY.call))
    np.testing.assert_array_equal(found.hist, expected.hist)
    edges = (EDGES * amax).astype(np.float32)
    if amax > 1e-40:  # below it the rounding of float32 is coarser than the bins
        found, expected = (
            call(klquant.percentile_threshold, HIST, edges, num_quantized_bins=5) for call in (jitted, NUMPY.call)
        )
        assert float(found.sqnr_db) == pytest.approx(float(expected.sqnr_db), rel=1e-6)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("how", ["eager", "jit"])
def test_strict_promotion_changes_nothing(criterion, how):
    import jax

    expected = criterion(HIST.astype(int), EDGES, num_quantized_bins=5)
    function = (lambda h, e: criterion(h, e, num_quantized_bins=5)) if how == "eager" else None
    function = function or jax.jit(lambda h, e: criterion(h, e, num_quantized_bins=5))
    with enable_x64(), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        found = function(JAX.asarray(HIST.astype(int)), JAX.asarray(EDGES))
    assert float(found.value) == pytest.approx(float(expected.value), rel=1e-13)


def test_strict_promotion_of_the_other_functions():
    import jax

    x, hist = JAX.asarray(np.ones((4, 3), np.float32)), JAX.asarray(HIST.astype(int))

    @jax.jit
    def everything(x, hist):
        scale = klquant.scale(x[0, 0])
        levels = klquant.quantize(x, scale)
        counted = klquant.histogram(x, num_bins=5, amax=2.0)
        return (
            klquant.dequantize(levels, scale),
            klquant.fake_quantize(x, klquant.scale(x[0]), axis=1),
            klquant.merge(counted, klquant.histogram(x, num_bins=5, amax=2.0)),
            klquant.histogram(x, num_bins=5, amax=x[:, 0], axis=0),
            klquant.kl_divergence(klquant.smooth(hist), klquant.smooth(hist)),
            klquant.quantized_distribution(hist, hist, num_quantized_bins=5),
        )

    with enable_x64(), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        everything(x, hist)


def test_histograms_stay_on_their_devices():
    job = Path(__file__).parents[1] / "support" / "sharding_job.py"
    done = subprocess.run([sys.executable, job], check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for name in ("entropy", "one-sided", "percentile", "mse"):
        assert f"{name} shard_map\n{name} sharded batch\n" in done.stdout
    for what in ("", ", vmap", ", jit(vmap)", ", histogram 0", ", histogram None", ", merging"):
        assert f"explicit mesh{what}\n" in done.stdout
