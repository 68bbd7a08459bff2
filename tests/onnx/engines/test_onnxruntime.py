"""Each reason is checked against onnxruntime itself: a node stays in floating point only if the reason holds."""

import platform

import numpy as np
import onnx
import onnxruntime
import pytest

from klquant.backends.onnx.engines.inspection import inspect
from support.qdq_models import INT8, INT8_LOWEST, SCALE, UINT8, UINT8_MIDDLE, WEIGHT_SCALE, Builder, residual_block

X86 = platform.machine() in ("x86_64", "AMD64")


def reports(model):
    return {report.name: report for report in inspect(model, "onnxruntime")}


def conv(grid=UINT8_MIDDLE, after=(), scale=SCALE, output=True, bias=None):
    """Return conv0, then nodes of (type, constants...), with quantizers around them all."""
    build = Builder()
    x = build.qdq("x", grid)
    more = [] if bias is None else [build.bias(4, bias)]
    y = build.node("Conv", x, build.weight(4, 4, 3, 3), *more)
    for op_type, *constants in after:
        y = build.node(op_type, y, *map(build.constant, constants))
    return build.model(build.qdq(y, grid, scale) if output else y)


def gemm(bias="int32", output=True, outputs=8, bias_scale=SCALE * WEIGHT_SCALE, **attributes):
    build = Builder()
    x = build.qdq("x", UINT8_MIDDLE)
    bias = build.bias(outputs, bias_scale) if bias == "int32" else build.floats(outputs)
    y = build.gemm(x, outputs, bias=bias, **attributes)
    return build.model(build.qdq(y, UINT8_MIDDLE) if output else y, shape=(4, 16))


def wrong_axis_of_conv():
    build = Builder()
    y = build.node("Conv", build.qdq("x", UINT8_MIDDLE), build.weight(4, 4, 3, 3, axis=1))
    return build.model(build.qdq(y, UINT8_MIDDLE))


def between(op_type, grid=UINT8_MIDDLE, scale=SCALE, quantized=True, **attributes):
    build = Builder()
    y = build.node(op_type, build.qdq("x", grid) if quantized else "x", **attributes)
    return build.model(build.qdq(y, grid, scale))


def combined(op_type, quantized=2, output=True, **attributes):
    build = Builder()
    inputs = [build.qdq(name, UINT8_MIDDLE) if number < quantized else name for number, name in enumerate("xy")]
    y = build.node(op_type, *inputs, **attributes)
    return build.model(build.qdq(y, UINT8_MIDDLE) if output else y, inputs=("x", "y"))


def read_twice(quantizers):
    build = Builder()
    y = build.node("Conv", build.qdq("x", UINT8_MIDDLE), build.weight(4, 4, 3, 3))
    if quantizers == 1:
        y = build.qdq(y, UINT8_MIDDLE)
    return build.model(build.node("Tanh", y), build.node("Exp", y))


def also_an_output(rectified=False):
    """Return a convolution whose quantized output is also an output of the model."""
    build = Builder()
    y = z = build.node("Conv", build.qdq("x", UINT8_MIDDLE), build.weight(4, 4, 3, 3))
    if rectified:
        z = build.node("Relu", y)
    return build.model(y, build.qdq(z, UINT8))


def other_constants(op_type="Conv", float_weight=True, bias=None, output=True):
    """Return a layer whose weight is floating point, or whose bias is quantized to another type."""
    build = Builder()
    shape = (4, 4, 3, 3) if op_type == "Conv" else (4, 4)
    weight = build.floats(*shape) if float_weight else build.weight(*shape, axis=0 if op_type == "Conv" else 1)
    more = [] if bias is None else [build.dequantized(np.ones(4, bias), SCALE * WEIGHT_SCALE, 0)]
    y = build.node(op_type, build.qdq("x", UINT8_MIDDLE), weight, *more)
    return build.model(build.qdq(y, UINT8_MIDDLE) if output else y, shape=(1, 4, 8, 8) if op_type == "Conv" else (2, 4))


def pooled(grid):
    build = Builder()
    y = build.node("Relu", build.conv(build.qdq("x", grid)))
    return build.model(build.qdq(build.node("MaxPool", y, **POOL), grid))


def wide(dtype, op_type="Conv"):
    build = Builder(opset=21)
    more = [build.weight(4, 4, 3, 3)] if op_type == "Conv" else []
    y = build.node(op_type, build.qdq("x", (dtype, 0)), *more)
    return build.model(build.qdq(y, (dtype, 0)))


def int8_result(grid):
    """Return a convolution whose int8 output is the output of the model."""
    build = Builder()
    y = build.node("Conv", build.qdq("x", grid), build.weight(4, 4, 3, 3))
    q = build.node("QuantizeLinear", y, build.constant(np.float32(SCALE)), build.constant(np.int8(0)))
    return build.model(q, types=[onnx.TensorProto.INT8])


POOL = {"kernel_shape": [2, 2]}
RELU, RELU6 = [("Relu",)], [("Clip", np.float32(0), np.float32(6))]
REASONS = {  # node, a part of its reason, a model where it holds, a model where it does not
    "input": (
        *("globalaveragepool0", "its input `x` has no DequantizeLinear"),
        *(between("GlobalAveragePool", quantized=False), between("GlobalAveragePool")),
    ),
    "second": ("add0", "its input `y` has no DequantizeLinear", combined("Add", quantized=1), combined("Add")),
    "concat": (
        "concat0",
        "its input `y` has no Deq",
        combined("Concat", quantized=1, axis=1),
        combined("Concat", axis=1),
    ),
    "output": ("conv0", "it is an output of the model", conv(output=False), conv()),
    "output of Mul": ("mul0", "it is an output of the model", combined("Mul", output=False), combined("Mul")),
    "other reader": ("conv0", "Sigmoid `sigmoid0` reads it", conv(after=[("Sigmoid",)]), conv()),
    "several readers": ("conv0", "Tanh `tanh0`, Exp `exp0` read it", read_twice(0), read_twice(1)),
    "Relu, int8": ("conv0", "Relu `relu0` comes before", conv(INT8, RELU), conv(INT8_LOWEST, RELU)),
    "Relu, uint8": ("conv0", "(uint8, scale 0.05, zero point 128)", conv(UINT8_MIDDLE, RELU), conv(UINT8, RELU)),
    "Relu alone": ("relu0", "below 0", between("Relu", grid=INT8), between("Relu", grid=INT8_LOWEST)),
    "Relu6, below": ("conv0", "below 0", conv(INT8, RELU6, 6 / 127), conv(INT8_LOWEST, RELU6, 6 / 255)),
    "Relu6, above": ("conv0", "up to 6.1, above 6", conv(UINT8, RELU6, 6.1 / 255), conv(UINT8, RELU6, 5.9 / 255)),
    "bias": ("conv0", "scale of its int32 bias", conv(bias=0.1), conv(bias=SCALE * WEIGHT_SCALE)),
    "float bias": (
        "gemm0",
        "its bias is not a DequantizeLinear of int32",
        gemm("float", output=False),
        gemm(output=False),
    ),
    "axis": ("gemm0", "scales of its weight run along axis 1, not along 0", gemm(axis=1), gemm()),
    "alpha": ("gemm0", "alpha is 0.5", gemm(alpha=0.5), gemm(alpha=1.0)),
    "beta": ("gemm0", "beta is 2", gemm(beta=2.0), gemm(beta=1.0)),
    "other grid": ("maxpool0", "scale 0.03", between("MaxPool", scale=0.03, **POOL), between("MaxPool", **POOL)),
    "also an output": ("conv0", "output of the model, and read by others", also_an_output(), conv()),
    "and before Relu": ("conv0", "output of the model, and read by others", also_an_output(True), conv(UINT8, RELU)),
    "not its weight": ("conv0", "its output has", other_constants(output=False), other_constants()),
    "weight": ("conv0", "`c0` has no DequantizeLinear", other_constants(bias=np.int32), other_constants()),
    "Gemm's": ("gemm0", "`c0` has no DequantizeLinear", other_constants("Gemm", output=False), other_constants("Gemm")),
    "MatMul's": (
        *("matmul0", "`c0` has no DequantizeLinear"),
        *(other_constants("MatMul"), other_constants("MatMul", float_weight=False)),
    ),
    "bias's type": (
        *("conv0", "but not of int32"),
        *(other_constants(float_weight=False, bias=np.int8), other_constants(float_weight=False, bias=np.int32)),
    ),
    "Relu and pool": ("conv0", "Relu `relu0` comes before", pooled(INT8), pooled(INT8_LOWEST)),
    "moved 16 bits": ("flatten0", "uint16, not 8 bits wide", wide(np.uint16, "Flatten"), wide(np.uint8, "Flatten")),
    "16 bits": ("conv0", "uint16, not 8 bits wide", wide(np.uint16), wide(np.uint8)),
}


@pytest.mark.parametrize("case", REASONS)
def test_the_reason_decides(case):
    node, reason, with_it, without_it = REASONS[case]
    report = reports(with_it)[node]
    assert not report.int8
    assert reason in report.reason
    assert reports(without_it)[node].int8


def results(model, x, **level):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level.get("level", onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (gemm(outputs=16, axis=1), "the scales of its weight run along axis 1, not along 0"),
        (gemm(bias_scale=0.1), "the scale of its int32 bias is not the product"),
        (wrong_axis_of_conv(), "the scales of its weight run along axis 1, not along 0"),
        (gemm(), ""),
        (conv(), ""),
    ],
)
def test_int8_with_wrong_results(model, reason):
    """Compare onnxruntime with and without optimizations."""
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    exact = results(model, x, level=onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)
    error = np.abs(results(model, x) - exact).max()
    (report,) = reports(model).values()
    assert report.int8
    assert (error > 1.5 * SCALE) == bool(reason)
    assert ("with wrong results: " + reason in report.reason) == bool(reason)


@pytest.mark.parametrize("op_type", ["ConvTranspose", "HardSigmoid", "Tanh", "GlobalMaxPool", "Sub"])
def test_operators_without_kernel(op_type):
    if op_type == "ConvTranspose":
        build = Builder()
        y = build.node(op_type, build.qdq("x", UINT8_MIDDLE), build.weight(4, 4, 3, 3, axis=1))
        model = build.model(build.qdq(y, UINT8_MIDDLE))
    else:
        model = combined(op_type) if op_type == "Sub" else between(op_type)
    assert reports(model)[f"{op_type.lower()}0"][2:] == (False, f"onnxruntime has no int8 kernel for {op_type}")


@pytest.mark.parametrize(
    ("model", "kernel"),
    [
        (conv(), "QLinearConv"),
        (conv(INT8), "QLinearConv"),
        (gemm(), "QGemm"),
        (gemm("float"), "QGemm"),
        (gemm(output=False), "QGemm"),
        (combined("MatMul"), "QLinearMatMul"),
        (combined("MatMul", output=False), "MatMulIntegerToFloat"),
        (combined("Add"), "QLinearAdd"),
        (combined("Mul"), "QLinearMul"),
        (combined("Concat", axis=1), "QLinearConcat"),
        (between("AveragePool", scale=0.03, **POOL), "QLinearAveragePool"),
        (between("Sigmoid", scale=0.01), "QLinearSigmoid"),
        (between("LeakyRelu"), "QLinearLeakyRelu"),
        (between("Softmax", scale=0.01), "QLinearSoftmax"),
        (between("Flatten"), "Flatten"),
    ],
)
def test_kernels_in_int8(model, kernel):
    assert [report[2:] for report in reports(model).values()] == [(True, f"executed as {kernel}")]


def test_fused_nodes_share_the_verdict():
    found = reports(conv(UINT8, RELU))
    assert found["relu0"][2:] == (True, "part of `conv0` (QLinearConv)")
    found = reports(conv(INT8, RELU))
    assert found["relu0"][2:] == (False, "part of `conv0`, which runs in floating point (FusedConv)")


def test_a_relu_that_its_quantizers_replace():
    build = Builder()
    y = build.qdq(build.conv(build.qdq("x", UINT8_MIDDLE)), UINT8_MIDDLE)
    found = reports(build.model(build.qdq(build.node("Relu", y), UINT8)))
    assert found["relu0"][2:] == (True, "onnxruntime removed it: its quantizers replace it")


def test_a_transpose_that_cancels_the_layout():
    build = Builder()
    y = build.qdq(build.conv(build.qdq("x", UINT8_MIDDLE)), UINT8_MIDDLE)
    found = reports(build.model(build.qdq(build.node("Transpose", y, perm=[0, 2, 3, 1]), UINT8_MIDDLE)))
    assert found["transpose0"][2:] == (True, "onnxruntime removed it: its quantizers replace it")


def test_functions_that_are_inlined():
    report = reports(between("HardSwish"))["hardswish0"]
    assert report[2:] == (False, "onnxruntime replaced it by other operators, in floating point")


def test_nodes_after_a_product_with_float_output():
    build = Builder()
    y = build.gemm(build.qdq("x", UINT8_MIDDLE), bias=build.bias(8))
    found = reports(build.model(build.node("Softmax", y), shape=(4, 16)))
    assert [report.int8 for report in found.values()] == [True, False]


def test_inputs_of_8_bits():
    build = Builder()
    model = build.model(
        build.node("MaxPool", "x", **POOL), input_type=onnx.TensorProto.UINT8, types=[onnx.TensorProto.UINT8]
    )
    assert reports(model)["maxpool0"].int8


def test_silu_is_fused_into_a_kernel_in_floating_point():
    build = Builder()
    y = build.conv(build.qdq("x", UINT8_MIDDLE))
    found = reports(build.model(build.qdq(build.node("Mul", y, build.node("Sigmoid", y)), UINT8_MIDDLE)))
    assert not any(report.int8 for report in found.values())
    assert "part of `mul0`" in found["sigmoid0"].reason
    assert "Sigmoid `sigmoid0`, Mul `mul0` read it" in found["conv0"].reason


def test_the_layout_of_floats_keeps_the_names():
    """Convolutions of 16 channels run in the NCHWc layout, as new nodes."""
    build = Builder()
    y = build.node("Relu", build.node("Conv", "x", build.floats(16, 16, 3, 3)))
    found = reports(build.model(build.node("MaxPool", y, **POOL), shape=(1, 16, 8, 8)))
    assert [report.int8 for report in found.values()] == [False] * 3
    assert found["conv0"].reason == "its input `x` has no DequantizeLinear"
    assert found["maxpool0"].reason == "its input `relu0` has no DequantizeLinear"


def test_residual_block():
    found = reports(residual_block(UINT8_MIDDLE, UINT8, sum_of_quantized=True))
    assert all(report.int8 for report in found.values())
    found = reports(residual_block(UINT8_MIDDLE, UINT8, sum_of_quantized=False))
    assert [name for name, report in found.items() if not report.int8] == ["conv1", "add0", "relu1"]
    assert "Add `add0` reads it" in found["conv1"].reason
    for name in ("add0", "relu1"):
        assert found[name].reason == "part of `conv1`, which runs in floating point (FusedConv)"


def test_types_of_input_and_output():
    report = reports(int8_result(UINT8_MIDDLE))["conv0"]
    assert report[2:] == (False, "its inputs and output must have one type, but are uint8, int8")


@pytest.mark.skipif(not X86, reason="on ARM onnxruntime leaves int8 as it is")
def test_int8_where_several_nodes_read():
    found = reports(residual_block(INT8, INT8_LOWEST, sum_of_quantized=True))
    for name, types in {"conv0": "int8, uint8", "add0": "uint8, int8, uint8"}.items():
        assert not found[name].int8
        assert f"are {types}: on x86 onnxruntime turns int8 into uint8" in found[name].reason
    assert found["relu0"][2:] == (False, "onnxruntime removed it; its input is in floating point")


def test_parameters_that_onnxruntime_writes_beside_its_graph():
    build = Builder()
    y = build.node("GlobalAveragePool", build.qdq("x", UINT8_MIDDLE, [SCALE] * 1500, axis=1))
    assert not reports(build.model(y, shape=(1, 1500, 2, 2)))["globalaveragepool0"].int8


def test_already_quantized_operators():
    build = Builder()
    scale, zero = build.constant(np.float32(SCALE)), build.constant(np.uint8(128))
    q = build.node("QuantizeLinear", "x", scale, zero)
    weight = build.constant(np.ones((4, 4, 3, 3), np.int8)), scale, build.constant(np.int8(0))
    y = build.node("QLinearConv", q, scale, zero, *weight, scale, zero)
    assert reports(build.model(build.node("DequantizeLinear", y, scale, zero)))["qlinearconv0"].int8
