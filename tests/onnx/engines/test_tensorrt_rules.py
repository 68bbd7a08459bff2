"""Each documented rule is broken once, and no other rule with it."""

import numpy as np
import onnx
import pytest

from klquant.backends.onnx.engines.inspection import inspect
from klquant.backends.onnx.engines.tensorrt import Violation, check_tensorrt
from klquant.backends.onnx.engines.tensorrt_rules import RULES
from support.qdq_models import INT8, SCALE, UINT8, UINT8_MIDDLE, Builder, residual_block


def broken(model):
    return {violation.rule for violation in check_tensorrt(model)}


def reports(model):
    return {report.name: report for report in inspect(model, "tensorrt")}


def conv(grid=INT8, scale=SCALE, **attributes):
    build = Builder(opset=attributes.pop("opset", 17))
    return build.model(build.conv(build.qdq("x", grid, scale, **attributes)))


def by_hand(zero_point=True, given=None):
    """Return a convolution whose quantizer has a zero point or not, and a constant scale or a computed one."""
    build = Builder()
    scale = (
        build.node("Abs", build.node("ReduceMax", "x", keepdims=0))
        if given == "scale"
        else build.constant(np.float32(SCALE))
    )
    more = [build.constant(np.int8(0))] if zero_point else []
    dequantized = build.node("DequantizeLinear", build.node("QuantizeLinear", "x", scale, *more), scale, *more)
    return build.model(build.conv(dequantized))


def layer(op_type, axis, shape=(4, 4, 3, 3), **attributes):
    build = Builder()
    y = build.node(op_type, build.qdq("x"), build.weight(*shape, axis=axis), **attributes)
    return build.model(y, shape=(1, 4, 8, 8) if len(shape) == 4 else (2, shape[0]))


def followed(*op_types):
    """Return a quantized convolution and the nodes after it; "Q" means a Q/DQ pair."""
    build = Builder()
    y = build.conv(build.qdq("x"))
    for op_type in op_types:
        more = [build.floats(4), build.floats(4), build.floats(4), build.constant(np.ones(4, np.float32))]
        y = build.qdq(y) if op_type == "Q" else build.node(op_type, y, *(more if op_type.startswith("Batch") else []))
    return build.model(y)


def residual(shortcut=True, branch=False, layers=1, quantized_layer=True):
    build = Builder()
    x = build.qdq("x")
    y = build.conv(x) if quantized_layer else build.node("Conv", "x", build.floats(4, 4, 3, 3), pads=[1] * 4)
    y = build.qdq(y) if branch else y
    other = build.qdq("x", scale=0.07) if shortcut else "x"
    other = build.qdq(build.conv(x)) if layers == 2 else other
    return build.model(build.qdq(build.node("Relu", build.node("Add", other, y))))


def concatenation(*scales):
    build = Builder()
    inputs = [name if scale is None else build.qdq(name, scale=scale) for name, scale in zip("xy", scales, strict=True)]
    return build.model(build.qdq(build.node("Concat", *inputs, axis=1)), inputs=("x", "y"))


def alone(op_type, *quantized, output=True, **attributes):
    build = Builder()
    inputs = [build.qdq(name) if yes else name for name, yes in zip("xy", quantized, strict=False)]
    y = build.node(op_type, *inputs, **attributes)
    return build.model(build.qdq(y) if output else y, inputs=("x", "y")[: len(quantized)])


def biased():
    build = Builder()
    return build.model(
        build.node("Conv", build.qdq("x"), build.weight(4, 4, 3, 3), build.dequantized(np.ones(4, np.int8), 1))
    )


def miscounted():
    build = Builder()
    scale, zero = build.constant(np.full(3, 0.01, np.float32)), build.constant(np.zeros(3, np.int8))
    weight = build.constant(np.ones((4, 4, 3, 3), np.int8))
    x = build.qdq("x")
    return build.model(build.node("Conv", x, build.node("DequantizeLinear", weight, scale, zero, axis=0)))


def half_quantized():
    build = Builder()
    return build.model(build.node("Conv", build.qdq("x"), build.floats(4, 4, 3, 3)))


def integer_convolution():
    build = Builder()
    q = build.node("QuantizeLinear", "x", build.constant(np.float32(SCALE)), build.constant(np.int8(0)))
    return build.model(
        build.node("ConvInteger", q, build.constant(np.ones((4, 4, 3, 3), np.int8))), types=[onnx.TensorProto.INT32]
    )


BROKEN = {  # by rule: a model that breaks it, the node that is named, a part of the message
    "constant_scale": (by_hand(given="scale"), "quantizelinear0", "its scale `abs0` must be a constant"),
    "positive_scale": (conv(scale=-0.5), "quantizelinear0", "must be positive and finite, got -0.5"),
    "zero_point_zero": (conv((np.int8, 3)), "quantizelinear0", "its zero point must be 0, got 3"),
    "int8_values": (conv(UINT8), "quantizelinear0", "must be int8, got uint8"),
    "one_scale_per_channel": (miscounted(), "dequantizelinear1", "its axis 0 has 4 slices, but there are 3 scales"),
    "per_tensor_activations": (conv(scale=[SCALE] * 4, axis=1), "quantizelinear0", "must have one scale, got 4"),
    "layer_inputs": (half_quantized(), "conv0", "its input `c2` has no QuantizeLinear and DequantizeLinear"),
    "weight_axis": (layer("Conv", 1), "conv0", "must run along axis 0, not 1"),
    "float_bias": (biased(), "conv0", "its bias `dequantizelinear2` must be floating point"),
    "contiguous_layer": (followed("Q", "Relu", "Q"), "relu0", "between it and Conv `conv0`"),
    "residual_shortcut": (residual(shortcut=False), "add0", "its shortcut `x` must be quantized"),
    "concat_scales": (concatenation(0.05, 0.06), "concat0", "must have one scale, got int8, scale 0.05"),
    "both_sides": (alone("Sigmoid", True, output=False), "sigmoid0", "its output `sigmoid0` has no QuantizeLinear"),
    "integer_operators": (integer_convolution(), "convinteger0", "TensorRT cannot import ConvInteger"),
}


def test_every_rule_is_broken_once():
    assert list(BROKEN) == [rule.__name__ for rule, _ in RULES]
    assert all(source.startswith("https://") and rule.__doc__ for rule, source in RULES)


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule(rule):
    model, node, message = BROKEN[rule]
    assert broken(model) == {rule}
    assert any(found.node == node and message in found.message for found in check_tensorrt(model))


@pytest.mark.parametrize("rule", BROKEN)
def test_nodes_that_break_a_rule_are_not_reported_as_int8(rule):
    model, _, message = BROKEN[rule]
    named = [report for report in inspect(model, "tensorrt") if message in report.reason]
    assert named
    assert not any(report.int8 for report in named)


@pytest.mark.parametrize("scale", [0.0, np.inf, np.nan])
def test_unusable_scales(scale):
    assert broken(conv(scale=scale)) == {"positive_scale"}


def test_zero_points():
    assert broken(conv(UINT8_MIDDLE)) == {"zero_point_zero", "int8_values"}
    without = check_tensorrt(by_hand(zero_point=False))
    assert {found.rule for found in without} == {"int8_values"}
    assert without[0].message.endswith("got uint8, ONNX's default without a zero point")
    assert not check_tensorrt(by_hand())


def test_parameters_that_are_computed_or_misfit():
    build = Builder()
    zero = build.node("Cast", build.node("ReduceMax", "x", keepdims=0), to=onnx.TensorProto.INT8)
    scale = build.constant(np.float32(SCALE))
    q = build.node("QuantizeLinear", "x", scale, zero)
    found = check_tensorrt(build.model(build.node("DequantizeLinear", q, scale, zero)))
    assert {(one.rule, one.message) for one in found} == {
        ("zero_point_zero", "its zero point `cast0` must be a constant")
    }
    build = Builder()
    scale, zero = build.constant(np.float32(SCALE)), build.constant(np.zeros(4, np.int8))
    q = build.node("QuantizeLinear", "x", scale, zero)
    (found,) = check_tensorrt(build.model(q, types=[onnx.TensorProto.INT8]))
    assert found[::2] == ("one_scale_per_channel", "it must have as many zero points as scales, got 4 and 1")


def test_an_axis_out_of_range():
    build = Builder()
    model = build.model(build.node("Conv", build.qdq("x"), build.weight(4, 4, 3, 3)))
    model.graph.node[-2].attribute[0].i = 7
    assert "its axis must be one of 4, got 7" in {found.message for found in check_tensorrt(model)}


def test_weights_that_the_model_quantizes_itself():
    build = Builder()
    weight = build.qdq(build.floats(4, 4, 3, 3), scale=[0.01] * 4, axis=0)
    model = build.model(build.node("Conv", build.qdq("x"), weight))
    assert not check_tensorrt(model)
    assert inspect(model, "tensorrt")[0].int8


def test_int32_bias():
    build = Builder()
    model = build.model(build.node("Conv", build.qdq("x"), build.weight(4, 4, 3, 3), build.bias(4)))
    assert broken(model) == {"int8_values", "float_bias"}


def test_scales_along_an_axis_need_opset_13():
    model = conv(opset=12)
    assert broken(model) == {"per_axis_opset"}
    assert check_tensorrt(model)[0].message == "scales along an axis need opset 13, got 12"


@pytest.mark.parametrize(
    ("op_type", "axis", "attributes"),
    [
        ("Conv", 0, {}),
        ("Conv", -4, {}),
        ("Conv", None, {}),
        ("ConvTranspose", 1, {}),
        ("Gemm", 0, {"transB": 1}),
        ("Gemm", 1, {"transB": 0}),
        ("MatMul", 1, {}),
        ("MatMul", -1, {}),
    ],
)
def test_axes_of_weights(op_type, axis, attributes):
    shape = (4, 4, 3, 3) if op_type.startswith("Conv") else (8, 8)
    model = layer(op_type, axis, shape, **attributes)
    assert not check_tensorrt(model)
    assert inspect(model, "tensorrt")[0].int8
    if axis is not None:
        other = 1 - axis % len(shape)
        assert broken(layer(op_type, other, shape, **attributes)) == {"weight_axis"}


def test_layers_in_floating_point_break_no_rule():
    build = Builder()
    model = build.model(build.node("Relu", build.node("Conv", "x", build.floats(4, 4, 3, 3))))
    assert not check_tensorrt(model)
    assert [report[2:] for report in inspect(model, "tensorrt")] == [
        (False, "none of its inputs comes from a DequantizeLinear"),
        (False, "part of `conv0`, which runs in floating point"),
    ]


def test_layer_normalization_and_activation():
    whole = followed("BatchNormalization", "Relu", "Q")
    assert not check_tensorrt(whole)
    assert all(report.int8 for report in inspect(whole, "tensorrt"))
    assert reports(whole)["relu0"].reason == "part of `batchnormalization0`"
    torn = followed("BatchNormalization", "Q", "Relu", "Q")
    assert [found[:2] for found in check_tensorrt(torn)] == [("contiguous_layer", "relu0")]
    assert broken(followed("Q", "BatchNormalization", "Relu", "Q")) == {"contiguous_layer"}


def test_sums_of_residual_blocks():
    assert not check_tensorrt(residual())
    assert not check_tensorrt(residual(layers=2))
    assert not check_tensorrt(residual(shortcut=False, quantized_layer=False))
    for model in (residual(branch=True), residual(branch=True, layers=2)):
        assert [found[1:] for found in check_tensorrt(model)] == [
            ("add0", "the branch of Conv `conv0` must not be quantized")
        ]
    assert all(report.int8 for report in inspect(residual(), "tensorrt"))
    assert not reports(residual(branch=True))["add0"].int8


def test_the_branch_may_end_in_a_normalization():
    build = Builder()
    x = build.qdq("x")
    constants = [build.floats(4), build.floats(4), build.floats(4), build.constant(np.ones(4, np.float32))]
    y = build.qdq(build.node("BatchNormalization", build.conv(x), *constants))
    model = build.model(build.qdq(build.node("Add", x, y)))
    assert [found.rule for found in check_tensorrt(model)] == ["residual_shortcut"]


def test_a_constant_is_no_shortcut():
    build = Builder()
    model = build.model(build.node("Add", build.conv(build.qdq("x")), build.floats(4, 1, 1)))
    assert not check_tensorrt(model)
    assert reports(model)["add0"].int8


def test_a_sum_without_layers_needs_quantizers_all_around():
    assert not check_tensorrt(alone("Add", True, True))
    assert broken(alone("Add", True, False)) == {"both_sides"}
    assert broken(alone("Add", True, True, output=False)) == {"both_sides"}
    assert not check_tensorrt(alone("Add", False, False))


def test_concatenated_tensors():
    assert not check_tensorrt(concatenation(SCALE, SCALE))
    assert reports(concatenation(SCALE, SCALE))["concat0"].int8
    assert check_tensorrt(concatenation(SCALE, None)) == [
        Violation("concat_scales", "concat0", "its input `y` must be quantized like the others")
    ]
    assert not check_tensorrt(concatenation(None, None))
    build = Builder()
    y = build.conv(build.node("Concat", build.qdq("x"), build.qdq("x"), axis=1), inputs=8)
    assert not check_tensorrt(build.model(y))


def test_pooling_commutes_with_quantizers():
    """TensorRT moves quantizers across nodes that only move values, so one side is enough."""
    build = Builder()
    y = build.conv(build.node("MaxPool", build.qdq("x"), kernel_shape=[2, 2]))
    y = build.node("MaxPool", build.node("Relu", y), kernel_shape=[2, 2])
    y = build.gemm(build.qdq(build.node("Flatten", y)), 10, 144, build.floats(10))
    model = build.model(y)
    assert not check_tensorrt(model)
    assert all(report.int8 for report in inspect(model, "tensorrt"))


def test_pooling_in_floating_point():
    build = Builder()
    model = build.model(build.node("MaxPool", "x", kernel_shape=[2, 2]))
    assert not inspect(model, "tensorrt")[0].int8


def test_averages_before_a_flattening():
    build = Builder()
    y = build.node("Flatten", build.node("GlobalAveragePool", build.qdq("x")))
    assert not check_tensorrt(build.model(build.qdq(y)))


def test_residual_block():
    model = residual_block(INT8, INT8, sum_of_quantized=False)
    assert not check_tensorrt(model)
    assert all(report.int8 for report in inspect(model, "tensorrt"))
    assert broken(residual_block(UINT8_MIDDLE, UINT8, sum_of_quantized=True)) == {
        "zero_point_zero",
        "int8_values",
        "residual_shortcut",
    }


def test_operators_on_integers_in_onnxruntimes_domain():
    model = by_hand()
    model.graph.node[-1].op_type = "QLinearAdd"
    assert "integer_operators" in broken(model)
