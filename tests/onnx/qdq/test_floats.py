"""Operators with weights that stay in floating point are named."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, parser

from klquant.backends.onnx import calibrate, quantize
from klquant.backends.onnx.model.graph import read_graph
from klquant.backends.onnx.qdq.floats import float_layers
from klquant.errors import CalibrationWarning, InvalidInputError

CONSTANTS = {"w": (8, 8), "i": np.array([1]), "b": (8,), "l": (1, 32, 8)}
RNG = np.random.default_rng(0)


def model(body, inputs="float[n, 4, 8] x, int64[n] k", **constants):
    opsets = '<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1, "own": 1]>'
    result = parser.parse_model(f"{opsets} g ({inputs}) => (float[m, a, b] y) {{ {body} }}")
    for name, value in (CONSTANTS | constants).items():
        array = RNG.normal(size=value).astype(np.float32) if isinstance(value, tuple) else value
        result.graph.initializer.append(numpy_helper.from_array(array, name))
    for node in result.graph.node:
        node.name = node.name or node.op_type
    return result


def named(body, exclude=(), **constants):
    return float_layers(read_graph(model(body, **constants)), exclude)


@pytest.mark.parametrize(
    "operator",
    [
        "LSTM<hidden_size=8>(x, l, l)",
        "GRU<hidden_size=8>(x, l, l)",
        "RNN<hidden_size=8>(x, l, l)",
        'Einsum<equation="abc,cd->abd">(x, w)',
        "Attention(x, x, x)",
        "Gather(w, k)",
        "com.microsoft.FusedMatMul(x, x)",
        "com.microsoft.FusedConv(x, x)",
        "com.microsoft.FusedGemm(x, x)",
        "com.microsoft.MultiHeadAttention(x, x, x)",
        "com.microsoft.EmbedLayerNormalization(k, , w)",
        "own.Layer(x, w)",
        "own.Conv(x, k)",
    ],
)
def test_operators_with_weights_are_named(operator):
    found = named(f"y = {operator}")
    assert list(found) == [operator.split("(")[0].split("<")[0].split(".")[-1]]
    assert "cannot be quantized" in next(iter(found.values()))


@pytest.mark.parametrize("operator", ["com.microsoft.QuickGelu(x)", "Gather(x, k)", "Gather(i, k)", "own.Layer(x, b)"])
def test_operators_without_weights_are_not_named(operator):
    assert not named(f"y = {operator}")


@pytest.mark.parametrize("source", ["Cast<to=1>(w)", "Transpose(w)", "Constant<value = float[1, 2] {1, 2}>()"])
def test_a_table_behind_a_cast_or_in_a_node_is_a_table(source):
    assert list(named(f"t = {source} y = Gather(t, k)")) == ["Gather"]


def test_what_is_excluded_is_named_without_a_warning():
    assert named("y = Gather(w, k)", exclude=("Gather",)) == {"Gather": "excluded by the settings"}


def body_of(operator, name="", inner=()):
    node = helper.make_node(operator, ["x", "w"], ["r"], name)
    output = helper.make_tensor_value_info("r", onnx.TensorProto.FLOAT, [None, 8, 8])
    return helper.make_graph([*inner, node], "body", [], [output])


def branches(then="MatMul", otherwise="Add", before="", name="choice"):
    result = model(f"{before} y = Identity(x)", inputs="float[n, 8, 8] x, bool c", w=(8, 8))
    choice = helper.make_node(
        "If", ["c"], ["y"], name, then_branch=body_of(then, "product"), else_branch=body_of(otherwise)
    )
    result.graph.node[-1].CopyFrom(choice)
    return result


def test_layers_in_bodies_are_named_by_their_paths():
    found = float_layers(read_graph(branches(otherwise="MatMul")), ())
    assert found.keys() == {"choice/then/product", "choice/else/r"}
    assert all("the body of If node `choice`" in reason for reason in found.values())


def test_a_body_in_a_body_and_its_exclusion():
    outer, inner = branches(), branches(name="inner").graph.node[-1]
    inner.output[0] = "q"
    host = next(one for one in outer.graph.node[-1].attribute if one.name == "then_branch")
    host.g.node.insert(0, inner)
    assert float_layers(read_graph(outer), ()).keys() == {"choice/then/inner/then/product", "choice/then/product"}
    found = float_layers(read_graph(outer), ("choice/then/product", "choice/then/inner/then/product"))
    assert set(found.values()) == {"excluded by the settings"}


DATA = [{"x": RNG.normal(size=(2, 8, 8)).astype(np.float32), "c": np.array(True)}]


def test_a_model_of_nothing_but_bodies_says_so():
    with pytest.raises(InvalidInputError, match=r"all operators with weights lie in the body of If node `choice`"):
        calibrate(branches(), DATA)


@pytest.mark.parametrize("engine", ["tensorrt", "onnxruntime", "openvino"])
def test_quantize_warns_of_bodies(engine):
    given = branches(before="z = MatMul(x, w)")
    given.graph.output.append(helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [None, 8, 8]))
    calibration = calibrate(given, DATA, criterion="max")
    with pytest.warns(CalibrationWarning, match="choice/then/product"):
        found = quantize(given, calibration, engine=engine)
    assert list(found.skipped) == ["choice/then/product"]
    excluded = quantize(given, calibration, engine=engine, exclude="choice/then/*")  # without a warning
    assert excluded.skipped == {"choice/then/product": "excluded by the settings"}
