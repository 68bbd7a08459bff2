from math import inf, nan

import numpy as np
import pytest

import klquant
from klquant import ArrayTypeError, InvalidInputError
from support.namespaces import JAX, NUMPY, import_torch, needs_jax, params

F32 = np.float32


def test_scale_is_a_127th_of_the_threshold(xp):
    assert klquant.scale(254.0) == 2.0
    assert klquant.scale(3.5, num_quantized_bins=15) == 0.5
    scales = xp.call(klquant.scale, xp.asarray([127.0, 63.5, 0.0], F32))
    assert xp.owns(scales)
    assert scales.dtype == F32
    np.testing.assert_array_equal(scales, [1, 0.5, 0])


def test_scale_of_a_known_tensorrt_cache_entry():
    known = np.array([0x3C010A14], ">u4").view(">f4")[0]
    assert F32(klquant.scale((2048 + 0.5) / 2048)) == known


def test_scale_takes_the_threshold_as_it_was_found(eager):
    hist, edges = klquant.histogram(eager.asarray([-7.0, -1.0, 0.0, 2.0, 3.0], F32), num_bins=7)
    threshold = klquant.optimal_threshold(hist, edges, num_quantized_bins=3)
    assert float(threshold) in (3, 5, 7)
    assert klquant.scale(float(threshold), num_quantized_bins=3) == float(threshold)
    assert float(klquant.scale(threshold.value, num_quantized_bins=3)) == float(threshold)


@pytest.mark.parametrize(
    ("x", "levels"),
    [
        ([-9.0, 0.25, 0.75, 1.0], [-18, 0, 2, 2]),
        ([0.25, 0.75, 1.25, 1.75, 2.25], [0, 2, 2, 4, 4]),  # half to even
        ([-0.25, -0.75, -1.25, -1.75], [0, -2, -2, -4]),
        ([63.5, 63.75, 64.0, 1e30, inf], [127, 127, 127, 127, 127]),
        ([-63.5, -63.75, -64.0, -1e30, -inf], [-127, -127, -127, -127, -127]),  # never -128
        ([63.2, 63.3], [126, 127]),
        ([[0.5], [1.0]], [[1], [2]]),
        (2.0, 4),
        ([], []),
    ],
)
def test_levels_by_hand(xp, x, levels):
    quantized = xp.call(klquant.quantize, xp.asarray(x, F32), xp.asarray(0.5, F32))
    assert xp.owns(quantized)
    assert quantized.dtype == np.int8
    np.testing.assert_array_equal(quantized, levels)


@pytest.mark.parametrize(
    ("levels", "dtype"), [(3, np.int8), (15, np.int8), (255, np.int8), (511, np.int16), (65535, np.int16)]
)
def test_levels_fit_their_dtype(xp, levels, dtype):
    quantized = xp.call(klquant.quantize, xp.asarray([-1e9, 1e9], F32), xp.asarray(0.5, F32), num_quantized_bins=levels)
    assert quantized.dtype == dtype
    np.testing.assert_array_equal(quantized, [-(levels // 2), levels // 2])


@pytest.mark.parametrize("levels", [257, 65537])
def test_the_largest_level_does_not_wrap_around(levels):
    quantized = klquant.quantize(np.array([-1e9, 1e9], F32), 0.5, num_quantized_bins=levels)
    np.testing.assert_array_equal(quantized, [-(levels // 2), levels // 2])


def test_values_that_overflow_when_divided_saturate():
    np.testing.assert_array_equal(klquant.quantize(np.array([3e38, -3e38], F32), 0.01), [127, -127])


def test_dequantize_multiplies(xp):
    real = xp.call(klquant.dequantize, xp.asarray([-127, 0, 3], np.int8), xp.asarray(0.5, F32))
    assert xp.owns(real)
    assert real.dtype == F32
    np.testing.assert_array_equal(real, [-63.5, 0, 1.5])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dequantize_gives_the_dtype_asked_for(xp, dtype):
    real = xp.call(klquant.dequantize, xp.asarray([100], np.int8), xp.asarray(0.1, F32), dtype=dtype)
    assert real.dtype == dtype
    np.testing.assert_array_equal(real, np.array([100 * F32(0.1)], F32).astype(dtype))


@pytest.mark.parametrize("dtype", [None, np.ones(2), "junk"])
def test_dequantize_refuses_what_is_no_dtype(dtype):
    with pytest.raises(klquant.ArrayTypeError, match="`dtype` must be floating point, got"):
        klquant.dequantize(np.array([1], np.int8), 0.5, dtype=dtype)


@pytest.mark.parametrize("function", [klquant.scale, lambda scale: klquant.quantize(np.ones(2), scale)])
def test_integers_beyond_float64_are_refused(function):
    with pytest.raises(klquant.InvalidInputError, match="must be finite and not negative, got 1000"):
        function(10**400)


def test_a_scalar_stays_a_scalar():
    level = klquant.quantize(np.float64(1.3), 0.5)
    assert (type(level), level) == (np.int8, 3)
    assert type(klquant.dequantize(level, 0.5)) is np.float32
    assert type(klquant.fake_quantize(np.float64(1.3), 0.5)) is np.float64


def test_dequantize_refuses_an_integer_dtype():
    with pytest.raises((ArrayTypeError, InvalidInputError)):
        klquant.dequantize(np.array([1], np.int8), 600.0, dtype="int8")


def test_dequantize_refuses_floating_point_levels():
    with pytest.raises(ArrayTypeError):
        klquant.dequantize(np.array([1.5]), 1.0)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_fake_quantize_keeps_the_dtype(xp, dtype):
    x = xp.asarray([-100.0, 0.3, 0.8, inf], dtype)
    result = xp.call(klquant.fake_quantize, x, xp.asarray(0.5, F32))
    assert xp.owns(result)
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, [-63.5, 0.5, 1.0, 63.5])


@needs_jax
def test_fake_quantize_keeps_bfloat16():
    x = JAX.asarray([-100.0, 0.3, 0.8], F32).astype("bfloat16")
    result = klquant.fake_quantize(x, 0.5)
    assert result.dtype == x.dtype
    np.testing.assert_array_equal(result.astype(F32), [-63.5, 0.5, 1.0])


@pytest.mark.parametrize(
    "xp",
    [
        *params(NUMPY),
        pytest.param(
            JAX,
            marks=needs_jax,
        ),
    ],
)
def test_double_precision_stays(xp):
    x, threshold = xp.asarray([0.1, 1e9], np.float64), xp.asarray(12.7, np.float64)
    scale = klquant.scale(threshold)
    assert scale.dtype == np.float64
    np.testing.assert_array_equal(klquant.fake_quantize(x, scale), [1 * (12.7 / 127), 127 * (12.7 / 127)])


def test_half_precision_is_computed_in_single(xp):
    x = xp.asarray([0.1, 12.5], np.float16)  # 0.1 is 0.09998 there
    scale = F32(0.1)
    expected = np.rint(np.array([0.1, 12.5], np.float16).astype(F32) / scale)
    np.testing.assert_array_equal(xp.call(klquant.quantize, x, xp.asarray(scale)), expected)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_each_channel_has_its_scale(xp, axis):
    x = xp.asarray([[0.25, 0.5], [-2.0, 3.0]], F32)
    quantized = xp.call(klquant.quantize, x, xp.asarray([0.25, 0.5], F32), axis=axis)
    np.testing.assert_array_equal(quantized, [[1, 2], [-4, 6]] if axis == 0 else [[1, 1], [-8, 6]])
    real = xp.call(klquant.dequantize, quantized, xp.asarray([0.25, 0.5], F32), axis=axis)
    np.testing.assert_array_equal(real, x)


def test_a_channel_with_scale_0_is_dead(xp):
    x, scale = xp.asarray([[1.0, -2.0], [1.0, -2.0]], F32), xp.asarray([0.0, 1.0], F32)
    np.testing.assert_array_equal(xp.call(klquant.quantize, x, scale, axis=0), [[0, 0], [1, -2]])
    np.testing.assert_array_equal(xp.call(klquant.fake_quantize, x, scale, axis=0), [[0, 0], [1, -2]])


def test_zero_is_exact(xp):
    zeros = xp.asarray([0.0, -0.0], F32)
    np.testing.assert_array_equal(xp.call(klquant.fake_quantize, zeros, xp.asarray(0.3, F32)), [0, 0])


@pytest.mark.parametrize("function", [klquant.quantize, klquant.fake_quantize])
def test_nan_is_refused(eager, function):
    with pytest.raises(InvalidInputError, match="`x` must not hold NaN, got 2 of 3 values"):
        function(eager.asarray([nan, 1.0, nan], F32), 0.5)


@pytest.mark.parametrize("function", [klquant.quantize, klquant.fake_quantize])
@pytest.mark.parametrize("scale", [-0.5, nan, inf])
def test_bad_scales_are_refused(eager, function, scale):
    with pytest.raises(InvalidInputError, match=rf"`scale` must be finite and not negative, got .*{scale}"):
        function(eager.asarray([1.0], F32), scale)
    with pytest.raises(InvalidInputError, match=rf"`scale` must be finite and not negative, got .*{scale}"):
        function(eager.asarray([1.0], F32), eager.asarray([scale], F32), axis=0)


def test_bad_scales_are_refused_by_dequantize(eager):
    with pytest.raises(InvalidInputError, match=r"`scale` must be finite and not negative, got -1\.0"):
        klquant.dequantize(eager.asarray([1], np.int8), -1.0)


@pytest.mark.parametrize("threshold", [-1.0, nan, inf])
def test_bad_thresholds_are_refused(eager, threshold):
    with pytest.raises(InvalidInputError, match=f"`threshold` must be finite and not negative, got {threshold}"):
        klquant.scale(threshold)
    with pytest.raises(InvalidInputError, match="`threshold` must be finite and not negative"):
        klquant.scale(eager.asarray([1.0, threshold], F32))


@pytest.mark.parametrize(
    ("scale", "axis", "message"),
    [
        ([0.5, 0.5], None, r"`scale` must be a scalar when `axis` is not given, got shape \(2,\)"),
        ([0.5, 0.5, 0.5], 0, r"`scale` must have shape \(x.shape\[axis\],\), got \(3,\) for \(2, 3\) and axis 0"),
        ([0.5, 0.5], 1, r"got \(2,\) for \(2, 3\) and axis 1"),
        ([0.5, 0.5], 2, r"got \(2,\) for \(2, 3\) and axis 2"),
        ([0.5, 0.5], -3, r"got \(2,\) for \(2, 3\) and axis -3"),
        (0.5, 0, r"got \(\) for \(2, 3\) and axis 0"),
        ([[0.5, 0.5]], 0, r"got \(1, 2\) for \(2, 3\) and axis 0"),
    ],
)
def test_scales_that_do_not_fit_the_axis_are_refused(xp, scale, axis, message):
    x, scale = xp.asarray(np.ones((2, 3)), F32), xp.asarray(scale, F32)
    for function in (klquant.quantize, klquant.fake_quantize):
        with pytest.raises(InvalidInputError, match=message):
            xp.call(function, x, scale, axis=axis)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32"])
def test_integers_are_refused(xp, dtype):
    with pytest.raises(ArrayTypeError, match=f"`x` must be floating point, got dtype {dtype}"):
        xp.call(klquant.quantize, xp.asarray([1], dtype), xp.asarray(0.5, F32))


def test_integers_do_not_dequantize_to_integers(xp):
    with pytest.raises(ArrayTypeError, match="`dtype` must be floating point, got int32"):
        xp.call(klquant.dequantize, xp.asarray([1], "int8"), 0.5, dtype="int32")


def test_arguments_that_are_not_real_arrays_are_refused():
    for x, message in [
        ([1.0], "`x` must be a NumPy or JAX array, got list"),
        (np.ones(1, complex), "got dtype complex"),
    ]:
        with pytest.raises(ArrayTypeError, match=message):
            klquant.quantize(x, 0.5)
    with pytest.raises(ArrayTypeError, match="`scale` must be a NumPy or JAX array, got list"):
        klquant.quantize(np.ones(1), [0.5], axis=0)
    with pytest.raises(ArrayTypeError, match="`threshold` must be a NumPy or JAX array, got list"):
        klquant.scale([0.5])
    with pytest.raises(ArrayTypeError, match="`q` must be a NumPy or JAX array, got list"):
        klquant.dequantize([1], 0.5)


def test_torch_tensors_are_sent_to_the_backend():
    torch = import_torch()
    with pytest.raises(ArrayTypeError, match=r"got torch\.Tensor; .*klquant\.backends\.torch"):
        klquant.fake_quantize(torch.ones(2), 0.5)


@needs_jax
def test_mixed_libraries_are_refused():
    with pytest.raises(ArrayTypeError, match="`x` from numpy, `scale` from jax"):
        klquant.quantize(np.ones(2, F32), JAX.asarray(0.5, F32))


@pytest.mark.parametrize("levels", [2, 254, 1])
def test_even_and_tiny_numbers_of_levels_are_refused(levels):
    message = f"`num_quantized_bins` must be odd and at least 3, got {levels}"
    with pytest.raises(InvalidInputError, match=message):
        klquant.scale(1.0, num_quantized_bins=levels)
    with pytest.raises(InvalidInputError, match=message):
        klquant.quantize(np.ones(2), 0.5, num_quantized_bins=levels)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.dtype("float64"), "float32", float])
def test_dequantize_takes_every_way_to_name_a_dtype(eager, dtype):
    real = klquant.dequantize(eager.asarray([1, -2], np.int8), 0.5, dtype=dtype)
    assert real.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(real, [0.5, -1.0])


@needs_jax
def test_dequantize_gives_bfloat16():
    import jax

    for dtype in (jax.numpy.bfloat16, "bfloat16"):
        real = klquant.dequantize(JAX.asarray([1, -2], np.int8), 0.5, dtype=dtype)
        assert real.dtype == jax.numpy.bfloat16


@pytest.mark.parametrize("dtype", ["junk", object(), np.complex64, bool])
def test_dequantize_refuses_what_is_no_floating_point_dtype(dtype):
    with pytest.raises(ArrayTypeError, match="`dtype` must be floating point, got "):
        klquant.dequantize(np.array([1], np.int8), 0.5, dtype=dtype)


def test_scale_takes_the_value_of_a_threshold(eager):
    hist, edges = np.arange(1, 8) % 5 + np.eye(2, 7, dtype=int), np.linspace(-7, 7, 8)
    for counts in (hist, hist[0]):
        threshold = klquant.mse_threshold(eager.asarray(counts), eager.asarray(edges), num_quantized_bins=3)
        scales = klquant.scale(threshold, num_quantized_bins=3)
        assert eager.owns(scales)
        np.testing.assert_array_equal(scales, threshold.value)


@pytest.mark.parametrize("bad", [True, "1", None])
def test_a_scale_is_a_number(bad):
    with pytest.raises(ArrayTypeError, match="`threshold` must be "):
        klquant.scale(bad)
    with pytest.raises(ArrayTypeError, match="`scale` must be "):
        klquant.quantize(np.ones(2), bad)


@pytest.mark.parametrize("scale", [1e-50, 1e39])
def test_scales_that_leave_the_working_dtype_are_refused(eager, scale):
    for function in (klquant.quantize, klquant.fake_quantize):
        with pytest.raises(InvalidInputError, match="`scale` must be 0 or within the range of float32, got 1e"):
            function(eager.asarray([1.0], F32), scale)
        function(eager.asarray([1.0], np.float64), scale)
    with pytest.raises(InvalidInputError, match="within the range of float32"):
        klquant.dequantize(eager.asarray([1], np.int8), scale)
    with pytest.raises(InvalidInputError, match="within the range of float32"):
        klquant.quantize(eager.asarray([1.0, 1.0], F32), eager.asarray([scale, 1.0], np.float64), axis=0)


def test_levels_are_exact_or_refused(eager):
    x = eager.asarray([1e12, -1e12], np.float64)
    assert klquant.quantize(x, 0.5, num_bits=32).tolist() == [2**31 - 1, 1 - 2**31]
    narrow = eager.asarray([1e12, -1e12], F32)
    assert klquant.quantize(narrow, 0.5, num_quantized_bins=2**25 + 1).tolist() == [2**24, -(2**24)]
    with pytest.raises(InvalidInputError, match=f"`num_quantized_bins` must be at most {2**25 + 1}, got {2**25 + 3}"):
        klquant.quantize(narrow, 0.5, num_quantized_bins=2**25 + 3)
    for function in (klquant.scale, lambda t, **levels: klquant.quantize(x, 0.5, **levels)):
        with pytest.raises(InvalidInputError, match=f"must be at most {2**32 - 1}, got {2**32 + 1}"):
            function(1.0, num_quantized_bins=2**32 + 1)


def test_a_threshold_in_place_of_a_scale_is_refused_with_the_right_hint():
    """`np.asarray` of a Threshold would not be its value."""
    threshold = klquant.max_threshold(np.array([1, 2, 1]), np.array([-3.0, -1, 1, 3]), num_quantized_bins=3)
    with pytest.raises(ArrayTypeError, match=r"got klquant._result.Threshold; take its `value`, .*klquant.scale"):
        klquant.quantize(np.ones(2), threshold)


@pytest.mark.parametrize("step", [1e-40, 3e-45, 1.1e-38])
def test_a_subnormal_scale_is_not_dead(xp, step):
    x, step = F32([1.0, -3e-37, 0.0]), F32(step)
    levels = klquant.quantize(x, step)
    assert levels.tolist()[::2] == [127, 0]
    scale = xp.asarray(step)
    np.testing.assert_array_equal(xp.call(klquant.quantize, xp.asarray(x), scale), levels)
    expected = F32(127) * step
    subnormal = expected < np.finfo(F32).tiny  # XLA takes it for 0 on a CPU, NumPy does not
    for found in (
        xp.call(klquant.fake_quantize, xp.asarray(x), scale),
        xp.call(klquant.dequantize, xp.asarray(F32([127, 0, 0]).astype(np.int8)), scale),
    ):
        assert float(found[0]) == expected or (subnormal and float(found[0]) == 0)


def test_subnormal_scales_of_channels_are_not_dead(xp):
    x, steps = np.full((3, 2), 1.5e-37, F32), F32([1e-39, 0, 1e-37])
    levels = xp.call(klquant.quantize, xp.asarray(x), xp.asarray(steps), axis=0)
    assert np.asarray(levels)[:, 0].tolist() == [127, 0, 2]
    real = xp.call(klquant.fake_quantize, xp.asarray(x), xp.asarray(steps), axis=0)
    np.testing.assert_array_equal(real, klquant.fake_quantize(x, steps, axis=0))


@needs_jax
def test_jax_has_no_dtype_in_another_byte_order():
    import jax.numpy as jnp

    assert klquant.dequantize(np.int8([1]), 0.5, dtype=">f4").dtype == np.dtype(">f4")
    with pytest.raises(ArrayTypeError, match="`dtype` must be in native byte order for JAX, got >f4"):
        klquant.dequantize(jnp.int8([1]), 0.5, dtype=">f4")
