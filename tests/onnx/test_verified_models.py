"""Small models of many kinds, quantized and compared with what each engine computes."""

import warnings

import numpy as np
import onnx
import pytest

import klquant
from klquant.backends.onnx import calibrate, inspect, quantize
from klquant.backends.onnx.verification import verify
from support.onnx_models import array, build, run

ENGINES = ("tensorrt", "openvino", "onnxruntime")
RNG = np.random.default_rng(7)


def normal(*shape, scale=1.0, dtype=np.float32):
    return (scale * RNG.normal(size=shape)).astype(dtype)


def quantized(model, x, engine, **options):
    """Return the quantized model, which loads and runs as it is written in onnxruntime and in its own engine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", klquant.CalibrationWarning)
        found = quantize(model, calibrate(model, [x], criterion="max", **options), engine=engine)
    onnx.checker.check_model(found.model)
    for ran in {engine, "onnxruntime"}:
        assert not verify(found.model, [x], ran).wrong
    return found


def sqnr(model, found, x):
    """Return by how many dB the outputs of the float model lie above the error, as onnxruntime executes both."""
    expected, got = run(model, x=x)["y"].astype(float), run(found.model, optimize=True, x=x)["y"]
    return 10 * np.log10((expected**2).sum() / max(((expected - got) ** 2).sum(), 1e-30))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("x", "weight"),
    [((3, 9, 16), (3, 16, 8)), ((9, 16), (1, 16, 8)), ((3, 9, 16), (16,)), ((2, 3, 9, 16), (2, 3, 16, 8))],
)  # fmt: skip
def test_weights_of_other_ranks(x, weight, engine):
    model = build(f"float{list(x)} x", "float y", "y = MatMul(x, w)", w=normal(*weight))
    values = normal(*x)
    found = quantized(model, values, engine)
    assert not found.skipped
    assert sqnr(model, found, values) > 25


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bias", [(8,), (1, 8), (1,), (), (1, 1), (32, 8), (32, 1)])
def test_biases_of_a_gemm(bias, engine):
    model = build("float[32, 16] x", "float y", "h = Gemm(x, w, b) y = Relu(h)", w=normal(16, 8), b=normal(*bias))
    values = normal(32, 16)
    found = quantized(model, values, engine)
    by_row = bias[:1] == (32,)
    assert ("gemm0" in found.skipped) == (by_row and engine == "onnxruntime")
    assert sqnr(model, found, values) > 30
    if engine == "onnxruntime":
        assert [node.int8 for node in inspect(found.model, engine) if node.op_type == "Gemm"] == [not by_row]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("small", [0.0, 1e-30, 1e-9, 1e-6])
@pytest.mark.parametrize("size", [0.02, 1.0, 1400.0])
def test_a_large_bias_of_a_channel_of_small_weights(size, small, engine):
    weight = normal(4, 3, 3, 3)
    weight[3] *= small
    bias = np.array([0.1, 0.2, -0.3, 12], np.float32)
    body = "c = Conv(x, w, b) r = Relu(c) y = Conv(r, v)"
    model = build("float[n, 3, 8, 8] x", "float y", body, w=weight, b=bias, v=normal(2, 4, 1, 1))
    values = normal(2, 3, 8, 8, scale=size)
    found = quantized(model, values, engine)
    assert not found.skipped
    assert sqnr(model, found, values) > 25


@pytest.mark.parametrize("engine", ENGINES)
def test_a_bias_that_makes_weights_coarser_is_a_warning(engine):
    """The weights lose bits that float32 would lose in the sum: the result is as exact as before."""
    bias = np.array([1e5, 0.1, -0.2, 0.3], np.float32)
    model = build("float[n, 16] x", "float y", "y = Gemm(x, w, b)", w=normal(16, 4, scale=1e-3), b=bias)
    values = normal(32, 16, scale=1e-3)
    calibration = {"x": float(np.abs(values).max())}
    with pytest.warns(klquant.CalibrationWarning, match=r"make weights coarser, in channels: 1 of `gemm0`"):
        found = quantize(model, calibration, engine=engine)
    error = np.abs(run(found.model, optimize=True, x=values)["y"] - run(model, x=values)["y"])
    assert (error.max(0) <= [0.02, 1e-6, 1e-6, 1e-6]).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_groups_of_a_transposed_convolution_with_biases_of_other_sizes(engine):
    bias = np.array([1e5, 0.1, 0.2, 0.3], np.float32)
    body = "c = ConvTranspose<group=2>(x, w, b) y = Conv(c, v)"
    weight = normal(4, 2, 2, 2, scale=1e-3)
    model = build(
        "float[n, 4, 6, 6] x", "float y", body, w=weight, b=bias, v=np.eye(4, dtype=np.float32)[1:, :, None, None]
    )
    values = normal(2, 4, 6, 6, scale=1e-3)
    found = quantized(model, values, engine)
    kept = [tensor for tensor in found.model.graph.initializer if tensor.name == "w_scale"]
    np.testing.assert_allclose([onnx.numpy_helper.to_array(one) for one in kept],
                               [np.abs(weight).max((0, 2, 3)) / 127] * len(kept), rtol=1e-3)  # fmt: skip
    assert len(kept) == (engine == "tensorrt")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("body", ["y = Gemm(x, w, b)", "m = MatMul(x, w) y = Add(m, b)"])
def test_a_large_bias_of_a_product(body, engine):
    weight = normal(16, 4)
    weight[:, 3] *= 1e-8
    model = build("float[n, 16] x", "float y", body, w=weight, b=np.array([0.1, 0.2, -0.3, 12], np.float32))
    values = normal(32, 16, scale=0.01)
    assert sqnr(model, quantized(model, values, engine), values) > 25


@pytest.mark.parametrize("engine", ENGINES)
def test_live_channels_behind_a_large_input(engine):
    weight = normal(4, 3, 1, 1, scale=2e-5)
    model = build("float[n, 3, 8, 8] x", "float y", "y = Conv(x, w)", w=weight)
    values = normal(2, 3, 8, 8, scale=1400)
    assert sqnr(model, quantized(model, values, engine), values) > 30
    assert not run(quantized(model, values, engine, dead_channel=1e-4).model, x=values)["y"].any()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("opset", [17, 19, 21, 22])
@pytest.mark.parametrize(
    "attributes",
    ["", "ceil_mode=1, strides=[2,2]", "pads=[1,1,1,1], count_include_pad=1", "pads=[1,1,1,1]", "dilations=[1,1]",
     "dilations=[2,2]"],
)  # fmt: skip
def test_pooling(attributes, opset, engine):
    if opset < 19 and "dilations" in attributes:
        pytest.skip("AveragePool has no dilations before opset 19")
    pool = f"AveragePool<kernel_shape=[3,3]{', ' * bool(attributes)}{attributes}>"
    body = f"c = Conv(x, w) p = {pool}(c) y = Conv(p, v)"
    model = build("float[n, 3, 12, 12] x", "float y", body, opset=opset, w=normal(4, 3, 3, 3), v=normal(2, 4, 1, 1))
    values = normal(2, 3, 12, 12)
    found = quantized(model, values, engine)
    assert sqnr(model, found, values) > 25
    if engine == "onnxruntime" and attributes == "dilations=[1,1]":
        assert all(node.int8 for node in inspect(found.model, engine) if node.op_type == "AveragePool")


@pytest.mark.parametrize("engine", ENGINES)
def test_an_input_that_is_an_output(engine):
    model = build("float[n, 16] x", "float y", "h = MatMul(x, w) y = Relu(h)", w=normal(16, 8))
    model.graph.output.append(model.graph.input[0])
    values = normal(32, 16)
    found = quantized(model, values, engine)
    np.testing.assert_array_equal(run(found.model, x=values)["x"], values)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("opset", [13, 17, 19, 21])
@pytest.mark.parametrize(
    "chain",
    [
        "v = Cast<to=1>(w)",
        "i = Identity(w) v = Cast<to=1>(i)",
        "t = Transpose(w) c = Cast<to=1>(t) v = Transpose(c)",
    ],
)
def test_weights_stored_in_float16(chain, opset, engine):
    body = f"{chain} h = MatMul(x, v) y = Relu(h)"
    model = build("float[n, 16] x", "float y", body, opset=opset, w=normal(16, 8, dtype=np.float16))
    values = normal(32, 16)
    found = quantized(model, values, engine)
    assert not found.skipped
    assert found.thresholds.keys() <= {"x", "y"}
    assert sqnr(model, found, values) > 30


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", [3e-7, 1e-5, 1e-3])
def test_tiny_ranges_of_float16(size, engine):
    half, body = np.float16, "y = MatMul(x, w)"
    model = build("float16[n, 8] x", "float16 y", body, opset=19, w=normal(8, 8, dtype=half))
    values = normal(32, 8, scale=size, dtype=half)
    found = quantized(model, values, engine)
    if engine == "onnxruntime":
        assert "no INT8 kernel for its input `x` of float16" in found.skipped["matmul0"]
        return
    assert not found.skipped
    assert array(found.model, "x_scale") > 0
    assert sqnr(model, found, values) > 25
