from itertools import pairwise

import onnx

from klquant.backends.onnx.model.normal_form import all_nodes, sort_values, tidy
from support.onnx_models import build

BRANCHES = """<ir_version: 8, opset_import: ["": 17, "unused": 1]>
    graph (float[n, 2] x, bool flag) => (float[n, 2] y) {
        a = Relu(x)
        b = Neg(x)
        c = If(flag) <then_branch = yes () => (float[n, 2] t) { t = Add(a, b) },
                      else_branch = no () => (float[n, 2] e) { e = Identity(a) }>
        y = Sub(c, b)
    }"""


def shuffled(model, order):
    nodes = [onnx.NodeProto.FromString(model.graph.node[k].SerializeToString()) for k in order]
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return result


def outputs(model):
    return [node.output[0] for node in model.graph.node]


def test_inner_nodes_are_nodes_too():
    assert [node.op_type for node in all_nodes(onnx.parser.parse_model(BRANCHES).graph)] == [
        *("Relu", "Neg", "If", "Add", "Identity", "Sub")
    ]


def test_nodes_get_the_order_of_the_other_model():
    model = onnx.parser.parse_model(BRANCHES)
    assert outputs(tidy(shuffled(model, [1, 0, 2, 3]), like=model)) == ["a", "b", "c", "y"]


def test_producers_come_before_their_readers_also_those_in_a_branch():
    model = onnx.parser.parse_model(BRANCHES)
    assert outputs(tidy(shuffled(model, [3, 1, 2, 0]), like=shuffled(model, [2, 3, 1, 0]))) == ["b", "a", "c", "y"]


def test_nodes_unknown_to_the_other_model_come_as_early_as_possible():
    model = build("float[n] x", "float y", "a = Relu(x) b = Neg(a) y = Exp(b)")
    other = build("float[n] x", "float y", "y = Exp(x)")
    assert outputs(tidy(shuffled(model, [2, 1, 0]), like=other)) == ["a", "b", "y"]


def test_long_chains_unknown_to_the_other_model_are_ordered():
    names = ["x", *(f"t{k}" for k in range(3000)), "y"]
    model = build("float[n] x", "float y", " ".join(f"{b} = Relu({a})" for a, b in pairwise(names)))
    other = build("float[n] x", "float y", "y = Exp(x)")
    assert outputs(tidy(shuffled(model, range(3000, -1, -1)), like=other)) == names[1:]


def test_omitted_inputs_and_outputs_are_not_tensors():
    body = 'a, "", c = LSTM<hidden_size = 2>(x, w, r, "", "", "", "") s = Squeeze(c, axis) y = Relu(s)'
    weights = {"w": (1, 8, 3), "r": (1, 8, 2)}
    model = build("float[n, 1, 3] x", "float y", body, **weights, axis=[0])
    assert outputs(tidy(shuffled(model, [2, 1, 0]), like=model)) == ["a", "s", "y"]


def test_nodes_without_a_unique_name_get_one():
    model = build("float[n] x", "float y", "a = Relu(x) b = Relu(a) c = Neg(b) y = Relu(c)")
    for node, name in zip(model.graph.node, ["same", "same", "Relu_y", ""], strict=True):
        node.name = name
    assert [node.name for node in tidy(model, like=model).graph.node] == ["same", "Relu_b", "Relu_y", "Relu_y_"]


def test_attributes_and_constants_are_sorted_by_name():
    model = build("float[n, 3] x", "float y", "y = Gemm<transB = 1, alpha = 2.0>(x, w, b)", w=(3, 3), b=(3,))
    tidied = tidy(model, like=model)
    assert [attribute.name for attribute in tidied.graph.node[0].attribute] == ["alpha", "transB"]
    assert [tensor.name for tensor in tidied.graph.initializer] == ["b", "w"]


def test_unused_operator_sets_go():
    model = onnx.parser.parse_model(BRANCHES)
    assert [entry.domain for entry in tidy(model, like=model).opset_import] == [""]


def test_types_come_in_the_order_of_their_tensors():
    model = build("float[n] x", "float y", "a = Relu(x) b = Neg(a) y = Exp(b)")
    model.graph.value_info.reverse()
    model.graph.value_info.add(name="gone")
    sort_values(model.graph)
    assert [value.name for value in model.graph.value_info] == ["a", "b"]
