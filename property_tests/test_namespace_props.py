import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import klquant
from klquant._namespace import array_namespace, compiled, count_truncated, from_numpy, in_float64, sum_selected
from strategies import fewer
from support.namespaces import EAGER, JAX, JIT, READ_ONLY, needs_jax, params

SMALLEST_NORMAL = np.finfo(np.float64).tiny
DTYPES = st.sampled_from(["int8", "uint8", "int32", "int64", "uint64", "float16", "float32", "float64"])


@compiled
def count(numbers, *, xp):
    return count_truncated(numbers, 1, 4, clip=True, xp=xp)


@compiled
def exact(numbers, *, xp):
    return in_float64(numbers, xp=xp)


@compiled
def doubled_where_selected(values, selected, *, xp):
    sizes = xp.arange(1, values.shape[0] + 1)

    def add(indices, begin, number):
        return xp.where(begin + xp.arange(number) == 0, values[indices, None] * 2.0, 0.0).sum(axis=1)

    return sum_selected(add, selected, sizes, 6, xp=xp) * selected


@pytest.mark.parametrize("xp", EAGER)
@given(npst.arrays(DTYPES, 5))
def test_moving_an_array_keeps_its_bits(xp, array):
    moved = from_numpy(array, xp=array_namespace(x=xp.asarray(0)))
    assert np.asarray(moved).tobytes() == array.tobytes()
    assert moved.dtype == array.dtype


@needs_jax
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@fewer()
@given(st.lists(st.integers(0, 2**16 - 1), min_size=64, max_size=64), st.sampled_from([0, 16, 32, 48]))
def test_every_bit_pattern_has_the_value_that_numpy_reads(dtype, words, shift):
    """Also the subnormal numbers, in place of which XLA would compute with 0."""
    kind = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)
    values = (
        (np.array(words, np.uint64) << np.uint64(shift % (8 * kind.itemsize))).astype(f"u{kind.itemsize}").view(kind)
    )
    with np.errstate(invalid="ignore"):  # a signalling NaN
        expected = values.astype(np.float64)
    if dtype == "float64":  # a subnormal one becomes the smallest normal one
        small = (expected != 0) & (np.abs(expected) < SMALLEST_NORMAL)
        expected[small] = np.copysign(SMALLEST_NORMAL, expected[small])
    np.testing.assert_array_equal(JIT.call(exact, JAX.asarray(values)), expected)


@pytest.mark.parametrize("xp", params(READ_ONLY, JAX, JIT))
@fewer()
@given(npst.arrays(np.int64, 12, elements=st.integers(-9, 9)))
def test_every_number_is_counted_once(xp, numbers):
    counts = np.asarray(xp.call(count, xp.asarray(numbers)))
    assert counts.tolist() == [np.clip(numbers, -4, 4).tolist().count(k) for k in range(-4, 5)]


@pytest.mark.parametrize("xp", params(READ_ONLY, JAX, JIT))
@fewer()
@given(npst.arrays(np.int64, 7, elements=st.integers(-9, 9)), npst.arrays(bool, 7))
def test_only_selected_values_are_computed(xp, values, selected):
    result = xp.call(doubled_where_selected, xp.asarray(values), xp.asarray(selected))
    np.testing.assert_array_equal(result, 2 * values * selected)


COUNT_DTYPES = st.sampled_from(["i1", "u2", "i4", "i8", "u8", "f2", "f4", "f8"])
FUNCTIONS = [klquant.optimal_threshold, klquant.max_threshold, klquant.percentile_threshold, klquant.mse_threshold]


@pytest.mark.parametrize("xp", EAGER)
@pytest.mark.parametrize("criterion", FUNCTIONS)
@given(dtype=COUNT_DTYPES, edge_dtype=st.sampled_from(["f2", "f4", "f8", "i4"]), batch=st.booleans())
def test_dtypes_of_thresholds(xp, criterion, dtype, edge_dtype, batch):
    hist, edges = xp.asarray(np.ones((2, 7) if batch else 7, dtype)), xp.asarray(np.arange(-7, 8, 2).astype(edge_dtype))
    found = criterion(hist, edges, num_quantized_bins=3)
    assert found.value.dtype == ("float64" if edge_dtype == "i4" else edge_dtype)
    assert found.index.dtype == "int32"
    assert found.divergence.dtype == found.clipped.dtype == found.sqnr_db.dtype == "float64"
    assert found.value.shape == found.index.shape == found.divergence.shape == ((2,) if batch else ())
    assert klquant.divergence_curve(hist, edges, num_quantized_bins=3).dtype == "float64"
    assert klquant.mse_curve(hist, edges, num_quantized_bins=3).dtype == "float64"


@pytest.mark.parametrize("xp", EAGER)
@given(dtype=COUNT_DTYPES, floating=st.sampled_from(["f2", "f4", "f8"]))
def test_dtypes_of_the_other_functions(xp, dtype, floating):
    values, x = xp.asarray(np.arange(1, 8).astype(dtype)), xp.asarray(np.linspace(-2, 2, 7).astype(floating))
    for hist, edges in (klquant.histogram(values, num_bins=3), klquant.histogram(x[None], num_bins=3, axis=0)):
        assert (hist.dtype, edges.dtype) == ("int64", "float64")
    assert klquant.smooth(values).dtype == klquant.kl_divergence(values, values).dtype == "float64"
    assert klquant.quantized_distribution(values, values, num_quantized_bins=3).dtype == "float64"
    assert klquant.quantize(x, 0.5).dtype == "int8"
    assert klquant.quantize(x, 0.5, num_bits=16).dtype == "int16"
    assert klquant.fake_quantize(x, 0.5).dtype == floating
    assert klquant.scale(x * x).dtype == floating
    assert klquant.dequantize(klquant.quantize(x, 0.5), 0.5).dtype == "float32"
    assert klquant.dequantize(klquant.quantize(x, 0.5), 0.5, dtype=np.dtype(floating)).dtype == floating
