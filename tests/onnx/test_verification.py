"""The engine's run of a quantized model against the model as written."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from klquant.backends.onnx import calibrate, inspect, prepare, quantize, verify
from klquant.backends.onnx.execution import quantized_tensors, unsteady_tensors
from klquant.backends.onnx.model.graph import read_graph
from klquant.backends.onnx.tensor_checks import Rows
from klquant.backends.settings import ENGINES
from klquant.errors import InvalidInputError, ModelError
from support import onnx_networks
from support.onnx_models import build

RNG = np.random.default_rng(5)
X = RNG.normal(size=(8, 3, 8, 8)).astype(np.float32)
pytestmark = pytest.mark.filterwarnings("ignore::klquant.errors.CalibrationWarning")
openvino_too = pytest.mark.parametrize("engine", ENGINES)


def convolutions():
    w, v = (RNG.normal(size=shape).astype(np.float32) / 5 for shape in ((4, 3, 3, 3), (2, 4, 1, 1)))
    body = "c = Conv(x, w, b) r = Relu(c) y = Conv(r, v)"
    return build("float[n, 3, 8, 8] x", "float y", body, w=w, b=np.ones(4, np.float32), v=v)


def quantized(engine, model=None):
    model = prepare(convolutions() if model is None else model)
    return quantize(model, calibrate(model, [X], criterion="max"), engine=engine).model


def changed(model, name, change):
    """Return the model with another value of a constant."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    tensor = next(tensor for tensor in result.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), name))
    return result


def skip_without(engine):
    if engine == "openvino":
        pytest.importorskip("openvino", reason="needs OpenVINO")


@openvino_too
@pytest.mark.parametrize("name", ["VGG", "residual net", "MobileNetV2"])
def test_trained_networks_are_computed_as_written(name, engine):
    skip_without(engine)
    model, data = onnx_networks.load(name), onnx_networks.digits()[0]
    found = quantize(model, calibrate(model, data), engine=engine, batches=data[:1]).verification
    assert found.wrong == []
    assert found.num_batches == 1
    assert len(found.checks) >= (10 if engine == "onnxruntime" else 1)
    assert ("was not run" if engine == "tensorrt" else "match the model") in str(found)


def test_a_bias_that_wraps_is_found_at_the_layer_that_has_it():
    """In steps this small it does not fit into INT32; where it is float, onnxruntime converts it itself, and wraps."""
    model = changed(quantized("onnxruntime"), "w_scale", lambda scales: scales * np.float32(1e-8))
    layer = next(node for node in model.graph.node if node.op_type == "Conv")
    layer.input[2] = "float_bias"
    model.graph.initializer.append(numpy_helper.from_array(np.ones(4, np.float32), "float_bias"))
    found = verify(model, [X], "onnxruntime")
    first = found.wrong[0]
    assert first.op_type == "Relu"
    assert first.difference > 20
    assert f"node `{first.node}`" in str(found)
    assert "rounding explains 1)" in str(found)


def test_a_model_that_does_not_run_is_an_error():
    model = quantized("onnxruntime")
    model.graph.node[-1].op_type = "Strange"
    with pytest.raises((ModelError, InvalidInputError), match="Strange"):
        verify(model, [X], "onnxruntime")


def test_quantize_refuses_what_its_engine_computes_otherwise(monkeypatch):
    model = prepare(convolutions())
    calibration = calibrate(model, [X], criterion="max")
    monkeypatch.setattr("klquant.backends.onnx.tensor_checks.LEVELS", -1)
    with pytest.raises(ModelError, match="the engine must compute what the quantized model says, got: onnxruntime: "):
        quantize(model, calibration, engine="onnxruntime", batches=[X])


def test_rules_that_tensorrt_would_refuse_are_an_error():
    model = changed(quantized("tensorrt"), "x_zero_point", lambda zero: zero + 1)
    with pytest.raises(ModelError, match="TensorRT must accept the model, got node"):
        verify(model, [X], "tensorrt")


@pytest.mark.parametrize(
    ("batches", "engine", "message"),
    [
        ([], "onnxruntime", "expected at least one batch to verify the model with, got none"),
        ([X, X[:, :2]], "onnxruntime", r"batch 1: input `x` must have shape"),
        ([X], "tflite", "`engine` must be one of"),
    ],
)
def test_what_cannot_be_verified_is_refused(batches, engine, message):
    with pytest.raises(InvalidInputError, match=message):
        verify(quantized("onnxruntime"), batches, engine)


def test_the_largest_difference_of_all_batches_is_kept():
    model = quantized("onnxruntime")
    one, two = (verify(model, batches, "onnxruntime") for batches in ([X[:2]], [X[:2], X[2:]]))
    assert (one.num_batches, two.num_batches) == (1, 2)
    assert [row.tensor for row in one.checks] == [row.tensor for row in two.checks]
    for first, both in zip(one.checks, two.checks, strict=True):
        assert both.difference - both.allowed >= first.difference - first.allowed


def test_values_that_are_not_finite_in_both_agree():
    body = "c = MatMul(x, w) z = Sub(c, c) i = Div(c, z) y = Concat <axis = 1> (c, i)"
    model = prepare(build("float[n, 4] x", "float y", body, w=(4, 4)))
    x = RNG.normal(size=(5, 4)).astype(np.float32)
    written = quantize(model, {"x": 3.0, "c": 9.0}, engine="onnxruntime", exclude=["Div", "Sub", "Concat"]).model
    assert verify(written, [x], "onnxruntime").wrong == []


W = {
    "Conv": ("Conv", (4, 4, 3, 3)),
    "grouped": ("Conv <group=2>", (4, 2, 1, 1)),
    "ConvTranspose": ("ConvTranspose", (4, 4, 2, 2)),
    "Gemm": ("Gemm", (6, 6)),
    "Gemm, B transposed": ("Gemm <transB=1>", (6, 6)),
    "MatMul": ("MatMul", (6, 6)),
}


def between_layers(form):
    """Return a model with a layer that has very different channels between two layers, and its data."""
    operator, shape = W[form]
    weight = RNG.normal(size=shape).astype(np.float32)
    spread = 10.0 ** np.linspace(-4, 0, shape[-1 if form in ("Gemm", "MatMul") else 0], dtype=np.float32)
    weight *= spread if form in ("Gemm", "MatMul") else spread.reshape(-1, *(1,) * (weight.ndim - 1))
    image = weight.ndim == 4
    outer, first = (("Conv", (4, 3, 1, 1)), (2, 4, 1, 1)) if image else (("MatMul", (5, 6)), (6, 2))
    names = "float[n, 3, 8, 8] x" if image else "float[n, 5] x"
    inner = "m = MatMul(r, w) o = Add(m, b)" if form == "MatMul" else f"o = {operator}(r, w, b)"
    body = f"a = {outer[0]}(x, u) r = Relu(a) {inner} s = Relu(o) y = {outer[0]}(s, v)"
    bias = np.full(weight.shape[0], 1e-5, np.float32)
    return build(names, "float y", body, u=outer[1], w=weight, v=first, b=bias), X if image else X[:, 0, 0, :5]


@pytest.mark.parametrize("form", W)
def test_a_layer_left_in_float_runs_in_float_between_layers_in_int8(form):
    """Onnxruntime would quantize its weight itself: per tensor, which rounds the small channels to 0."""
    model, data = between_layers(form)
    prepared = prepare(model)
    layer = next(node.name for node in prepared.graph.nodes if "w" in node.input)
    calibration = calibrate(prepared, [data], criterion="max")
    found = quantize(prepared, calibration, engine="onnxruntime", exclude=layer, batches=[data])
    assert found.verification.wrong == []
    assert "w" in {tensor.name for tensor in found.model.graph.initializer}
    int8 = {node.name for node in inspect(found.model, "onnxruntime") if node.int8}
    assert layer not in int8
    assert len(int8) >= 2


def test_verify_takes_the_result_of_quantize():
    model = prepare(convolutions())
    found = quantize(model, calibrate(model, [X], criterion="max"), engine="onnxruntime")
    assert verify(found, [X], "onnxruntime").wrong == []


@pytest.mark.parametrize(("noise", "fine"), [(6e-6, True), (1e-3, False)])
def test_silence_may_have_the_noise_of_float32(noise, fine):
    """A LayerNormalization of constants gives 0, or what the sum of its inputs was off by, enlarged."""
    rows = Rows(read_graph(convolutions()))

    def outputs(value):
        return lambda names, feed: {"y": np.full(8, value, np.float32)}

    rows.compare_whole(["y"], outputs(noise), outputs(0), {"x": X})
    assert rows.result("openvino", "OpenVINO").checks[0].ok == fine


@pytest.mark.parametrize(("exact", "fine"), [(0.85, True), (0.95, False), (None, False)])
def test_whole_runs_may_differ_by_what_quantization_changes(exact, fine):
    """Behind a softmax one rounding may turn an answer over, in the engine or in the model as written."""
    rows = Rows(read_graph(convolutions()))

    def outputs(value):
        return lambda names, feed: {"y": np.full(8, value, np.float32)}

    rows.compare_whole(["y"], outputs(1.3), outputs(1), {"x": X}, None if exact is None else outputs(exact))
    assert rows.result("onnxruntime", "onnxruntime").checks[0].ok == fine


@pytest.mark.parametrize(
    ("choice", "kind"), [("ArgMax(s)", "int64"), ("Greater(s, half)", "bool"), ("TopK(s, one)", "float")]
)
def test_choices_are_compared_over_the_whole_run_only(choice, kind):
    """Rounding alone can turn them: where a loop or a choice lies between, the engine's own float model differs."""
    body = f"c = Conv(x, w) r = Relu(c) s = Conv(r, v) y{', i' if kind == 'float' else ''} = {choice}"
    constants = {"w": RNG.normal(size=(4, 3, 3, 3)), "v": RNG.normal(size=(2, 4, 1, 1)), "half": 0.5}
    floats = {name: np.asarray(value, np.float32) for name, value in constants.items()}
    model = build("float[n, 3, 8, 8] x", f"{kind} y, float s", body, **floats, one=np.ones(1, np.int64))
    checks = verify(quantized("onnxruntime", model), [X], "onnxruntime").checks
    assert [check.node for check in checks if check.tensor == "y"] == ["the whole run"]
    assert len([check.node for check in checks if check.tensor == "s"]) == 2


def test_what_is_quantized_behind_a_choice_is_compared_again():
    body = "c = Conv(x, w) b = Greater(c, zero) k = Where(b, c, zero) y = Conv(k, v)"
    constants = {"w": RNG.normal(size=(4, 3, 3, 3)), "v": RNG.normal(size=(2, 4, 1, 1)), "zero": 0}
    floats = {name: np.asarray(value, np.float32) for name, value in constants.items()}
    given = quantized("onnxruntime", build("float[n, 3, 8, 8] x", "float y", body, **floats))
    graph = read_graph(given)
    unsteady = unsteady_tensors(graph, quantized_tensors(graph))
    assert {"b", "k"} <= unsteady
    assert "y" not in unsteady
