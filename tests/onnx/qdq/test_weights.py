import numpy as np
import pytest
from onnx import numpy_helper

import klquant
from klquant.backends.onnx.model.graph import read_graph
from klquant.backends.onnx.qdq.weights import quantize_bias, quantize_operand, quantize_weight, weight_scales
from support.onnx_models import build


def tensor(values, dtype=np.float32):
    return numpy_helper.from_array(np.asarray(values, dtype), "w")


@pytest.mark.parametrize("axis", [0, 1])
def test_each_output_channel_has_its_scale(axis):
    weight = np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32)
    found = quantize_weight(tensor(weight), axis)
    others = tuple({0, 1, 2} - {axis})
    np.testing.assert_array_equal(found.scale, np.abs(weight).max(others) / np.float32(127))
    np.testing.assert_array_equal(np.abs(found.codes).max(others), 127)
    assert found.codes.dtype == np.int8
    restored = klquant.dequantize(found.codes, found.scale, axis=axis)
    assert np.abs(restored - weight).max() <= found.scale.max() / 2 * (1 + 1e-6)


@pytest.mark.parametrize(("small", "cutoff"), [(0.0, 0.0), (9e-5, 1e-4)])
def test_a_dead_channel_is_zero_with_a_scale_that_engines_accept(small, cutoff):
    found = quantize_weight(tensor([[1.0, -2.0], [small, -small]]), 0, dead_channel=cutoff)
    np.testing.assert_array_equal(found.codes, [[64, -127], [0, 0]])
    assert (found.scale > 0).all()


@pytest.mark.parametrize(("dtype", "small"), [(np.float32, 9e-5), (np.float32, 1e-30), (np.float16, 3e-6)])
def test_a_small_channel_lives(dtype, small):
    weight = np.array([[1.0, -2.0], [small, -small / 2]], dtype)
    found = quantize_weight(tensor(weight, dtype), 0)
    restored = found.codes * found.scale.astype(np.float64)[:, None]
    assert found.scale.dtype == dtype
    assert (np.abs(restored - weight) <= found.scale[:, None] * 0.51).all()
    assert found.codes.all()


def test_a_floor_raises_the_scale():
    found = quantize_weight(tensor([[1.0, -2.0], [1.0, -2.0]]), 0, floor=np.array([0.0, 0.5]))
    np.testing.assert_array_equal(found.codes, [[64, -127], [2, -4]])
    assert found.scale[1] == 0.5


def test_channels_that_lose_two_bits_are_counted():
    floor = np.array([0.0, 2, 3, 4, 100]) * 4 * 2 / 127
    weight = np.array([[1.0, -2.0]] * 4 + [[0.0, 0.0]])
    assert quantize_weight(tensor(weight), 0, floor=floor / 2.5).coarse == 2


def test_one_scale_for_a_whole_weight():
    found = quantize_weight(tensor(np.arange(8.0).reshape(2, 2, 2)), None)
    assert found.scale.shape == ()
    assert found.codes.max() == 127


def test_reduced_range_keeps_products_small():
    found = quantize_weight(tensor([[1.2, -2.0]]), 0, reduce_range=True)
    np.testing.assert_array_equal(found.codes, [[38, -63]])
    np.testing.assert_allclose(found.scale, 2 / 63, rtol=1e-6)


def test_half_precision_keeps_its_type():
    found = quantize_weight(tensor([[1.0, -2.0]], np.float16), 0)
    assert found.scale.dtype == np.float16
    np.testing.assert_array_equal(found.codes, np.rint(np.array([[1.0, -2.0]]) / found.scale))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(value):
    with pytest.raises(klquant.InvalidInputError, match="`w` must be finite"):
        quantize_weight(tensor([[1.0, value]]), 0)


def test_scales_of_all_layers_are_known_before_anything_is_written():
    weight = np.array([[1.0, -2.0], [0, 0]], np.float32)
    model = build(
        "float[n, 2] x", "float y", "a = Gemm<transB=1>(x, w) b = MatMul(a, a) y = MatMul(b, v)", w=weight, v=(2, 2)
    )
    found = weight_scales(read_graph(model), 8)
    assert found.keys() == {"gemm0", "matmul2"}
    np.testing.assert_allclose(found["gemm0"], [2 / 127, 0.0], rtol=1e-6)


def test_a_bias_counts_in_products():
    found = quantize_bias(np.array([0.5, -0.25], np.float32), 0.1, np.array([0.01, 0.02], np.float32))
    np.testing.assert_array_equal(found.codes, [500, -125])
    np.testing.assert_allclose(found.scale, [1e-3, 2e-3], rtol=1e-6)
    assert found.codes.dtype == np.int32


@pytest.mark.parametrize("bias", [[1.0, 1e9], [1.0, np.nan], [[1.0, 2.0]], 1.0])
def test_a_bias_that_does_not_fit_stays_in_floating_point(bias):
    assert quantize_bias(np.asarray(bias), 0.1, np.array([0.01, 0.02], np.float32)) is None


@pytest.mark.parametrize("value", [3.0, -0.25, 1e-3])
def test_an_operand_of_one_value_is_exact(value):
    found = quantize_operand(numpy_helper.from_array(np.float32(value)))
    assert found.codes.dtype == np.uint8
    assert (float(found.codes) - found.zero_point) * float(found.scale) == pytest.approx(value, rel=1e-6)


def test_an_operand_of_many_values_is_within_half_a_step():
    values = np.random.default_rng(0).normal(size=(64, 1, 1)).astype(np.float32)
    found = quantize_operand(numpy_helper.from_array(values))
    back = (found.codes.astype(np.float32) - found.zero_point) * found.scale
    assert np.abs(back - values).max() <= 0.51 * found.scale
    assert found.scale == pytest.approx(np.ptp(values) / 255)
