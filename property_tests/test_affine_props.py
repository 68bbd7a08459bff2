import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import klquant
from klquant.testing import activations, assert_fake_quantizer, assert_nearest_levels, halfway_values, scales
from strategies import fewer
from support.namespaces import JAX, JIT, READ_ONLY, params

LEVELS = st.sampled_from([3, 15, 255])
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])
ROUNDING = {np.float32: 3e-5, np.float64: 1e-13}  # relative to the scale, over 127 levels


@st.composite
def cases(draw, dtype):
    scale = draw(scales(dtype=dtype), label="scale")
    x = draw(activations(dtype=dtype) | halfway_values(scale, dtype=dtype), label="x")
    return x, scale, draw(LEVELS, label="levels")


def fake(x, scale, levels, axis=None):
    return klquant.fake_quantize(x, scale, axis=axis, num_quantized_bins=levels)


@given(cases(np.float64))
def test_levels_are_those_of_python(case):
    x, scale, levels = case
    qmax = levels // 2
    expected = [max(-qmax, min(qmax, round(value / scale))) for value in x.tolist()]
    assert klquant.quantize(x, scale, num_quantized_bins=levels).tolist() == expected


@DTYPES
@given(data=st.data())
def test_the_error_is_at_most_half_a_scale_inside(dtype, data):
    x, scale, levels = data.draw(cases(dtype))
    inside = np.abs(x) <= scale * (levels // 2)
    error = np.abs(fake(x, scale, levels).astype(np.float64) - x)[inside]
    assert (error <= scale * (0.5 + ROUNDING[dtype])).all()


@DTYPES
@given(data=st.data())
def test_values_outside_saturate(dtype, data):
    x, scale, levels = data.draw(cases(dtype))
    largest = dtype(levels // 2) * dtype(scale)
    outside = np.abs(x) >= largest
    np.testing.assert_array_equal(fake(x, scale, levels)[outside], (np.sign(x) * largest)[outside])
    assert (np.abs(fake(x, scale, levels)) <= largest).all()


@DTYPES
@given(data=st.data())
def test_quantize_then_dequantize_is_fake_quantize(dtype, data):
    x, scale, levels = data.draw(cases(dtype))
    q = klquant.quantize(x, scale, num_quantized_bins=levels)
    assert q.dtype == np.int8
    assert klquant.dequantize(q, scale, dtype=np.dtype(dtype).name).tobytes() == fake(x, scale, levels).tobytes()


@given(npst.arrays(np.int8, st.integers(0, 30), elements=st.integers(-127, 127)), scales(dtype="float64"))
def test_every_level_comes_back_from_its_real_value(q, scale):
    np.testing.assert_array_equal(klquant.quantize(klquant.dequantize(q, scale, dtype="float64"), scale), q)


@given(cases(np.float64), st.integers(-40, 40))
def test_powers_of_two_change_no_level(case, exponent):
    x, scale, levels = case
    assume((np.abs(x[x != 0]) > 1e-250).all())
    scaled = klquant.quantize(x * 2.0**exponent, scale * 2.0**exponent, num_quantized_bins=levels)
    np.testing.assert_array_equal(scaled, klquant.quantize(x, scale, num_quantized_bins=levels))


@given(st.floats(1e-6, 1e6), LEVELS)
def test_the_threshold_is_the_largest_level(threshold, levels):
    scale = klquant.scale(threshold, num_quantized_bins=levels)
    assert scale * (levels // 2) == pytest.approx(threshold, rel=1e-15)
    ends = klquant.quantize(np.array([-threshold, threshold]), scale, num_quantized_bins=levels)
    assert ends.tolist() == [-(levels // 2), levels // 2]


@st.composite
def tensors_with_channels(draw):
    shape = draw(npst.array_shapes(min_dims=1, max_dims=4, max_side=4))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    x = draw(npst.arrays(np.float32, shape, elements=st.floats(-1000, 1000, width=32)))
    scale = draw(npst.arrays(np.float32, shape[axis], elements=st.just(0.0) | st.floats(2**-7, 8, width=32)))
    return x, scale, axis


@given(tensors_with_channels())
def test_an_axis_is_one_scale_per_slice(drawn):
    x, scale, axis = drawn
    q = klquant.quantize(x, scale, axis=axis)
    real = klquant.dequantize(q, scale, axis=axis)
    both = klquant.fake_quantize(x, scale, axis=axis)
    for k, step in enumerate(scale.tolist()):
        part = np.take(x, k, axis)
        np.testing.assert_array_equal(np.take(q, k, axis), klquant.quantize(part, step))
        np.testing.assert_array_equal(np.take(real, k, axis), klquant.dequantize(np.take(q, k, axis), step))
        np.testing.assert_array_equal(np.take(both, k, axis), klquant.fake_quantize(part, step))


@given(tensors_with_channels())
def test_a_dead_channel_is_all_zeros(drawn):
    x, scale, axis = drawn
    dead = np.take(klquant.quantize(x, scale, axis=axis), np.flatnonzero(scale == 0), axis)
    assert not dead.any()


@pytest.mark.parametrize("xp", params(READ_ONLY, JAX, JIT))
@fewer()
@given(data=st.data())
def test_every_library_finds_the_same_levels(xp, data):
    x, scale, _ = data.draw(cases(np.float32))
    x = np.resize(np.append(x, np.float32(0)), 16)  # one size: each costs a compilation
    before = x.tobytes()
    arrays = xp.asarray(x), xp.asarray(scale, np.float32)
    q, expected = xp.call(klquant.quantize, *arrays), klquant.quantize(x, scale)
    # XLA multiplies by the reciprocal of a scalar instead of dividing: half-way cases may round either way
    halfway = np.abs(x / scale % 1 - 0.5) < 1e-4
    assert (np.abs(np.asarray(q, np.int16) - expected) <= (halfway if xp.is_jax else 0)).all()
    real = xp.call(klquant.fake_quantize, *arrays)
    np.testing.assert_array_equal(real, np.asarray(q) * np.float32(scale))
    assert x.tobytes() == before


@DTYPES
@given(data=st.data())
def test_every_value_is_rounded_to_its_nearest_level(dtype, data):
    x, scale, levels = data.draw(cases(dtype))
    tolerance = 2**-40 if dtype == np.float64 else 2**-16
    q = klquant.quantize(x, scale, num_quantized_bins=levels)
    assert_nearest_levels(q, x, scale, num_quantized_bins=levels, tolerance=tolerance)
    options = {"num_quantized_bins": levels, "tolerance": 1e-3}
    assert_fake_quantizer(lambda x: fake(x, scale, levels), x, scale, **options)


@st.composite
def stored_otherwise(draw, x):
    """Draw the same values in another byte order or memory layout."""
    swapped = x.astype(x.dtype.newbyteorder(draw(st.sampled_from("<>"))))
    layouts = {
        "as it is": lambda: swapped,
        "every second": lambda: np.repeat(swapped, 2)[::2],
        "backwards": lambda: swapped[::-1].copy()[::-1],
        "not aligned, read-only": lambda: np.frombuffer(b"." + swapped.tobytes(), swapped.dtype, offset=1),
    }
    return layouts[draw(st.sampled_from(list(layouts)))]()


@DTYPES
@given(data=st.data())
def test_no_result_depends_on_how_the_values_are_stored(dtype, data):
    x, scale, levels = data.draw(cases(dtype))
    stored = data.draw(stored_otherwise(x))
    expected = klquant.quantize(x, scale, num_quantized_bins=levels)
    np.testing.assert_array_equal(klquant.quantize(stored, scale, num_quantized_bins=levels), expected)
    np.testing.assert_array_equal(fake(stored, scale, levels), fake(x, scale, levels))
    counted, same = (klquant.histogram(values, num_bins=15, amax=3.0).hist for values in (x, stored))
    np.testing.assert_array_equal(same, counted)


@given(cases(np.float64), st.integers(2, 10))
def test_bits_are_an_odd_number_of_levels(case, bits):
    x, scale, _ = case
    expected = klquant.quantize(x, scale, num_quantized_bins=2**bits - 1)
    np.testing.assert_array_equal(klquant.quantize(x, scale, num_bits=bits), expected)
    assert klquant.fake_quantize(x, scale, num_bits=bits).tobytes() == fake(x, scale, 2**bits - 1).tobytes()
    assert klquant.scale(scale, num_bits=bits) == klquant.scale(scale, num_quantized_bins=2**bits - 1)


@given(st.sampled_from([3, 255, 257, 65535, 65537, 2**25 + 1, 2**32 - 1]), scales(dtype="float64"))
def test_the_smallest_integers_hold_the_levels(levels, scale):
    dtype = np.float32 if levels <= 2**25 + 1 else np.float64
    ends = klquant.quantize(np.array([-1e38, 1e38], dtype), scale, num_quantized_bins=levels)
    assert ends.tolist() == [-(levels // 2), levels // 2]
    smaller = {1: None, 2: np.int8, 4: np.int16}[ends.dtype.itemsize]
    assert smaller is None or levels // 2 > np.iinfo(smaller).max


@given(st.sampled_from([np.float16, np.float32, np.float64]), st.floats(1e-60, 1e-30) | st.floats(1e30, 1e60))
def test_extreme_scales_are_right_or_refused(dtype, scale):
    x = np.array([1, -1], dtype)
    try:
        real = klquant.fake_quantize(x, scale)
    except klquant.InvalidInputError:
        assert not 1e-45 < scale < 3.4e38
        assert dtype != np.float64
        return
    largest = 127 * scale if scale < 1 else 0.0
    np.testing.assert_allclose(real.astype(np.float64), [largest, -largest], rtol=1e-3, atol=1e-7)
