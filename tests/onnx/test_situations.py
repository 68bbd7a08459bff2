"""Models as other tools write them: each is calibrated, quantized for every engine, and run there as it is written."""

import warnings

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, parser

from klquant.backends.onnx import calibrate, inspect, prepare, quantize, sensitivity, tune
from klquant.backends.settings import ENGINES
from klquant.errors import CalibrationWarning, InvalidInputError

RNG = np.random.default_rng(11)
every_engine = pytest.mark.parametrize("engine", ENGINES)


def normal(*shape, scale=1.0):
    return (scale * RNG.normal(size=shape)).astype(np.float32)


def model(inputs, outputs, body, *, opset=17, **constants):
    """Return a model whose outputs have no shapes and whose nodes have no names, unlike those of `build`."""
    opsets = f'<ir_version: 8, opset_import: ["": {opset}, "com.microsoft": 1]>'
    result = parser.parse_model(f"{opsets} g ({inputs}) => ({outputs}) {{ {body} }}")
    result.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()
    )
    for output in result.graph.output:
        output.type.tensor_type.ClearField("shape")
    return result


def verified(given, data, engine, skipped=()):
    """Quantize for an engine, which runs the result as it is written; return the quantized model."""
    if engine == "openvino":
        pytest.importorskip("openvino", reason="needs OpenVINO")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        found = quantize(given, calibrate(given, data, criterion="max"), engine=engine, batches=data)
    assert found.verification.wrong == []
    assert found.skipped.keys() == set(skipped)
    return found.model


def int8_of(quantized, engine, *kinds):
    return [node.int8 for node in inspect(quantized, engine) if node.op_type in (kinds or ("Conv", "MatMul", "Gemm"))]


F = np.float32
TWO = {"w": normal(8, 8), "v": normal(8, 3)}


@every_engine
@pytest.mark.parametrize("opset", [9, 17])
def test_outputs_without_a_shape(opset, engine):
    given = model("float[n, 8] x", "float y", "a = MatMul(x, w) r = Relu(a) y = MatMul(r, v)", opset=opset, **TWO)
    assert all(int8_of(verified(given, [normal(5, 8)], engine), engine))


@every_engine
def test_nodes_of_one_name_and_omitted_inputs_at_the_end(engine):
    given = model("float[n, 8] x", "float y", "a = Gemm(x, w) r = Relu(a) y = MatMul(r, v)", **TWO)
    for node in given.graph.node:
        node.name = "same"
    given.graph.node[0].input.append("")
    verified(given, [normal(5, 8)], engine)
    assert len({node.name for node in prepare(given).graph.nodes}) == 3


def sparse(shape, size, linear):
    places = np.sort(RNG.choice(np.prod(shape), size, replace=False))
    places = places if linear else np.stack(np.unravel_index(places, shape), axis=1)
    values, indices = (numpy_helper.from_array(array, "w") for array in (normal(size), places.astype(np.int64)))
    return helper.make_sparse_tensor(values, indices, shape)


@every_engine
@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("in_node", [True, False])
def test_sparse_weights(in_node, linear, engine):
    body = "w = Constant<value_float = 1.0>() a = MatMul(x, w) y = Relu(a)"
    given = model("float[n, 8] x", "float y", body)
    node = given.graph.node[0]
    if in_node:
        node.attribute[0].CopyFrom(helper.make_attribute("sparse_value", sparse([8, 4], 9, linear)))
    else:
        given.graph.node.remove(node)
        given.graph.sparse_initializer.append(sparse([8, 4], 9, linear))
    assert all(int8_of(verified(given, [normal(5, 8)], engine), engine))


def test_a_sparse_weight_of_terabytes_is_refused():
    given = model("float[n, 8] x", "float y", "y = MatMul(x, w)")
    given.graph.sparse_initializer.append(sparse([8, 4], 9, True))
    given.graph.sparse_initializer[0].dims[:] = [2**20, 2**20]
    with pytest.raises(InvalidInputError, match="sparse constant of at most"):
        prepare(given)


@pytest.mark.parametrize("engine", ["tensorrt", "onnxruntime"])  # OpenVINO has no such outputs
def test_a_sequence_as_output(engine):
    given = model("float[n, 8] x", "float y", "a = MatMul(x, w) y = SplitToSequence<axis=1>(a)", **TWO)
    given.graph.output[0].CopyFrom(helper.make_tensor_sequence_value_info("y", onnx.TensorProto.FLOAT, None))
    verified(given, [normal(5, 8)], engine)


@every_engine
def test_inputs_that_are_numbers(engine):
    body = "a = Conv(x, w) r = Clip(a, lo, hi) y = Conv(r, v)"
    given = model(
        "float[n, 3, 8, 8] x, float lo, float hi", "float y", body, w=normal(4, 3, 3, 3), v=normal(2, 4, 1, 1)
    )
    data = {"x": normal(2, 3, 8, 8), "lo": np.zeros((), np.float32), "hi": np.full((), 3, np.float32)}
    verified(given, [data], engine)


@every_engine
def test_a_residual_sum_of_matrices_is_no_bias(engine):
    """onnxruntime joins product and sum in one Gemm, whose bias would not be constant."""
    given = model("float[n, 8] x", "float y, float z", "a = MatMul(x, w) y = Add(x, a) z = Relu(x)", **TWO)
    found = verified(given, [normal(5, 8)], engine)
    assert [node.op_type for node in found.graph.node if "Linear" not in node.op_type] == ["MatMul", "Add", "Relu"]
    assert int8_of(found, engine, "MatMul") == [True]


@every_engine
def test_a_gemm_whose_addend_is_its_input(engine):
    given = model("float[n, 8] x", "float y", "y = Gemm(x, w, x)", **TWO)
    layer = [node.op_type + "_" + node.output[0] for node in given.graph.node] if engine == "onnxruntime" else []
    found = verified(given, [normal(5, 8)], engine, skipped=layer)
    assert found.graph.node[-1].input[2] == "x"


@every_engine
@pytest.mark.parametrize(
    "middle",
    ["c = Concat<axis=1>(a, e, k)", "c = Concat<axis=1>(a, a, a)", "s = Add(a, a) c = Concat<axis=1>(s, s, s)",
     "g = GlobalAveragePool(a) s = Add(g, a) c = Concat<axis=1>(s, s, s)"],
)  # fmt: skip
def test_joints(middle, engine):
    body = f"a = Conv(x, w) {middle} y = Conv(c, v)"
    inputs = "float[n, 3, 8, 8] x, float[n, 4, 8, 8] e"
    constants = {"w": normal(4, 3, 1, 1), "k": normal(2, 4, 8, 8), "v": normal(2, 12, 1, 1)}
    data = {"x": normal(2, 3, 8, 8), "e": normal(2, 4, 8, 8)}
    verified(model(inputs, "float y", body, **constants), [data], engine)


@every_engine
def test_constants_and_inputs_as_outputs_and_outputs_named_twice(engine):
    given = model(
        "float[n, 8] x", "float y, float[8, 8] w, float r", "a = MatMul(x, w) r = Relu(a) y = MatMul(r, v)", **TWO
    )
    given.graph.output.extend([given.graph.output[0], given.graph.input[0]])
    verified(given, [normal(5, 8)], engine)


@every_engine
@pytest.mark.parametrize("operator", ["com.microsoft.QuickGelu(a)", "com.microsoft.BiasGelu(a, b)"])
def test_types_behind_operators_that_onnx_does_not_know(operator, engine):
    body = f"a = MatMul(x, w) g = {operator} r = Relu(g) y = MatMul(r, v)"
    given = model("float[n, 32] x", "float y", body, w=normal(32, 64), b=normal(64), v=normal(64, 3))
    assert int8_of(verified(given, [normal(5, 32)], engine), engine) == [True, True]


@every_engine
def test_a_float16_model_is_quantized_where_the_engine_can(engine):
    half = np.float16
    given = model("float16[n, 8] x", "float16 y", "a = MatMul(x, w) y = Relu(a)", opset=19, w=normal(8, 8).astype(half))
    skipped = ["MatMul_a"] if engine == "onnxruntime" else []
    verified(given, [normal(5, 8).astype(half)], engine, skipped=skipped)


def test_empty_batches_do_not_count():
    given = model("float[n, 8] x", "float y", "a = MatMul(x, w) y = Relu(a)", **TWO)
    full, empty = np.abs(normal(5, 8)) + 1, normal(0, 8)
    for data in ([empty, full], [full, empty]):
        assert calibrate(given, data, criterion="max").ranges["x"] == (full.min(), full.max())
    with pytest.warns(CalibrationWarning):
        assert calibrate(given, [empty]).ranges["x"] == (0, 0)


@every_engine
@pytest.mark.parametrize("hidden", [-np.inf, -1e9, float(np.finfo(np.float32).min)])
def test_scores_of_attention_behind_a_mask(hidden, engine):
    body = "q = MatMul(x, w) s = MatMul(q, t) h = Where(keep, zero, far) m = Add(s, h) p = Softmax(m) y = MatMul(p, v)"
    constants = {"w": normal(8, 8), "t": normal(8, 6), "v": normal(6, 3)}
    given = model("float[n, 8] x, bool[n, 6] keep", "float y", body, zero=F(0), far=F(hidden), **constants)
    keep = np.arange(6) < np.arange(1, 6)[:, None]
    data = [{"x": normal(5, 8), "keep": keep}]
    verified(given, data, engine)
    found = calibrate(given, data, criterion="max")
    assert {"h", "m"} <= (found.skipped.keys() if np.isinf(hidden) else found.thresholds.keys())


def test_infinity_that_is_no_constant_of_the_model():
    given = model("float[n, 8] x", "float y", "a = MatMul(x, w) r = Relu(a) y = MatMul(r, v)", **TWO)
    with pytest.raises(InvalidInputError, match="tensor `x`, batch 0: activations must be finite, got inf"):
        calibrate(given, [np.full((2, 8), np.inf, np.float32)])


@every_engine
@pytest.mark.parametrize("size", [{"dim_value": -1}, {"dim_param": "?"}])
def test_free_sizes_as_paddlepaddle_writes_them(size, engine):
    one, other = "a = Conv(x, w) r = Tanh(a) c = Conv(r, v)", "b = Conv(z, w) s = Tanh(b) d = Conv(s, v)"
    body = f"{one} p = GlobalAveragePool(c) {other} q = GlobalAveragePool(d) y = Add(p, q)"
    given = model(
        "float[n, 3, h, w] x, float[n, 3, h, w] z", "float y", body, w=normal(8, 3, 3, 3), v=normal(8, 8, 1, 1)
    )
    for dim in (dim for value in given.graph.input for dim in value.type.tensor_type.shape.dim[2:]):
        dim.CopyFrom(onnx.TensorShapeProto.Dimension(**size))
    verified(given, [{"x": normal(2, 3, 9, 16), "z": normal(2, 3, 5, 4)}], engine)


def with_six_samples():
    """Return a model with a constant that fixes the number of samples, and data: such batches can't be cut."""
    body = "a = MatMul(x, w) k = Concat<axis = 1>(a, c) r = Relu(k) y = MatMul(r, v)"
    given = model("float[n, 8] x", "float y", body, w=normal(8, 8), c=normal(6, 2), v=normal(10, 3))
    return given, [normal(6, 8) for _ in range(4)]


@every_engine
def test_a_constant_that_fixes_the_number_of_samples(engine):
    verified(*with_six_samples(), engine)


def test_accuracy_of_a_model_that_fixes_the_number_of_samples():
    given, batches = with_six_samples()
    calibration = calibrate(given, batches, criterion="auto", progress=False)
    costs = sensitivity(given, calibration, batches, engine="onnxruntime").costs
    assert {"x", "r"} <= {one.name for one in costs}
    tuned = tune(given, batches, engine="onnxruntime", target="90dB", min_int8=0.5, progress=False)
    assert any(trial.recipe.exclude for trial in tuned.trace.trials)
