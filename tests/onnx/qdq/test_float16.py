import numpy as np
import onnx
import pytest
from onnx import TensorProto

from klquant.backends.onnx import calibrate, check_tensorrt, prepare, quantize
from klquant.errors import InvalidInputError
from support.onnx_models import build, run

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 3, 8, 8)).astype(np.float32)
BODY = """
    c = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
    r = Relu (c)
    u = Resize (r, , scales)
    d = Conv (u, w2)
    l = LayerNormalization (d, g)
    t = Add (l, d)
    p = ReduceMean <axes = [2, 3], keepdims = 0> (t)
    f = Gemm (p, w3)
    y = Softmax (f)
"""


def network(opset=17, factor=1.0):
    scales = np.array([1, 1, 2, 2], np.float32)
    w1 = (factor * np.random.default_rng(1).normal(size=(4, 3, 3, 3))).astype(np.float32)
    return build("float[n, 3, 8, 8] x", "float[n, 5] y", BODY, opset=opset, scales=scales, w1=w1,
                 b1=np.ones(4, np.float32), w2=(4, 4, 3, 3), g=np.ones(14, np.float32), w3=(4, 5))  # fmt: skip


@pytest.fixture(scope="module")
def quantized():
    prepared = prepare(network())
    calibration = calibrate(prepared, [X], criterion="max")
    return prepared, *(quantize(prepared, calibration, float16=float16).model for float16 in (False, True))


def kinds(model):
    """Return the types of all tensors whose type onnx can infer."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = (*inferred.input, *inferred.output, *inferred.value_info)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return found | {tensor.name: tensor.data_type for tensor in inferred.initializer}


def test_all_but_inputs_outputs_and_the_scales_of_a_resize_is_float16(quantized):
    _, _, half = quantized
    found = kinds(half)
    assert {name for name, kind in found.items() if kind == TensorProto.FLOAT} == {"x", "y", "scales"}
    for node in half.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert found[node.input[1]] == TensorProto.FLOAT16
            assert found[node.input[2]] == TensorProto.INT8
    assert half.opset_import[0].version == 19


def test_the_same_is_quantized_and_tensorrt_accepts_it(quantized):
    prepared, full, half = quantized
    assert not check_tensorrt(half)
    counts = [
        [
            sum(node.op_type == kind for node in model.graph.node)
            for kind in ("QuantizeLinear", "DequantizeLinear", "Conv")
        ]
        for model in (full, half)
    ]
    assert counts[0] == counts[1]
    assert {node.name for node in prepared.graph.nodes} <= {node.name for node in half.graph.node}


def test_float16_costs_little_beside_int8(quantized):
    prepared, full, half = quantized
    floats, eight, both = (run(model, x=X)["y"] for model in (prepared.model, full, half))
    assert both.dtype == np.float32
    assert np.std(both - floats) < 1.2 * np.std(eight - floats) + 1e-3
    assert np.std(both - eight) < 0.05 * np.std(eight)


def test_values_beyond_float16_stay_in_float32():
    prepared = prepare(network(factor=1e5))
    calibration = calibrate(prepared, [X], criterion="max")
    model = quantize(prepared, calibration, float16=True, exclude="Conv").model
    assert kinds(model)["w1"] == TensorProto.FLOAT
    outputs = run(model, x=X)["y"], run(prepared.model, x=X)["y"]
    np.testing.assert_allclose(*outputs, atol=0.02)


def test_newer_opsets_stay_as_they_are():
    prepared = prepare(build("float[n, 8] x", "float[n, 4] y", "y = MatMul(x, w)", opset=21, w=(8, 4)))
    model = quantize(prepared, {"x": 3.0}, float16=True).model
    assert model.opset_import[0].version == 21


def test_verified_with_data():
    prepared = prepare(network())
    calibration = calibrate(prepared, [X], criterion="max")
    found = quantize(prepared, calibration, float16=True, batches=[X])
    assert found.verification is not None
    assert not found.verification.wrong


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("option", ["float16", "skip_slow"])
def test_options_of_tensorrt_are_refused_for_other_engines(engine, option):
    with pytest.raises(InvalidInputError, match=f"`{option}` needs engine=\"tensorrt\", got '{engine}'"):
        quantize(network(), {"x": 3.0}, engine=engine, **{option: True})


def test_slow_layers_are_left_out():
    """The first convolution has 3 channels, the product one column."""
    body = "c = Conv(x, w) r = Relu(c) d = Conv(r, v) p = GlobalAveragePool(d) f = Flatten(p) y = Gemm(f, u)"
    model = build("float[2, 3, 8, 8] x", "float[2, 1] y", body, w=(10, 3, 3, 3), v=(32, 10, 3, 3), u=(32, 1))
    calibration = calibrate(model, [X[:2]], criterion="max")
    with_all, without = (quantize(model, calibration, skip_slow=slow) for slow in (False, True))
    assert not with_all.skipped
    assert without.skipped.keys() == {"conv0", "gemm5"}
