"""The products whose inputs SmoothQuant scales, and the Mul in front of them where no constant takes up the factors."""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ..correction.parameters import unused
from ..feeds import Array
from ..model.graph import Graph, copied, read_graph
from ..model.normal_form import all_nodes
from ..model.observed import observed_tensors
from ..model.operators import attribute, has_constant_weight
from ..model.preparation import Prepared
from ..qdq.plan import EVERYONE
from ..qdq.rules import make_plan
from .absorption import find_views
from .channel_flow import Scaling, View


def find_products(graph: Graph) -> list[Scaling]:
    """Return the MatMul and Gemm nodes with a constant matrix, by the activation whose last axis they multiply."""
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in (one for one in graph.nodes if one.op_type in ("MatMul", "Gemm")):
        constant = has_constant_weight(graph, node) and len(graph.initializers[node.input[1]].dims) == 2
        if constant and not attribute(node, "transA", 0):
            found.setdefault(node.input[0], []).append(node)
    return [_scaling(graph, name, layers) for name, layers in found.items()]


def _scaling(graph: Graph, name: str, layers: list[onnx.NodeProto]) -> Scaling:
    shapes = [(list(graph.initializers[node.input[1]].dims), attribute(node, "transB", 0)) for node in layers]
    views = [
        View(node.name, 1, (1, *shape, 1) if transposed else (1, shape[0], shape[1], 1), 2 if transposed else 1)
        for node, (shape, transposed) in zip(layers, shapes, strict=True)
    ]
    behind = [(name, view) for view in views]
    before = find_views(graph, name, views[0].shape[views[0].axis])
    others = {node.name for node in graph.consumers[name]} - {node.name for node in layers}
    once = all(list(node.input).count(name) == 1 for node in layers)
    if before is None or others or not once or name in graph.outputs:
        return Scaling([], [name], behind, axis=-1)
    return Scaling(before, _up_to(graph, name, {view.node for view in before}), behind, axis=-1)


def _up_to(graph: Graph, name: str, nodes: set[str]) -> list[str]:
    """Return all tensors that are scaled, from this one up to the first node with constants."""
    names = [name]
    while (node := graph.producers[names[-1]]).name not in nodes or node.op_type == "Add":
        names.append(next(one for one in node.input if one not in graph.initializers))
    return names


def divisible(prepared: Prepared, scalings: Sequence[Scaling]) -> set[str]:
    """Return the activations that a Mul can read before they are quantized: where INT8 kernels compute them it cannot.

    That is a question of the engine; onnxruntime quantizes the outputs of more operators than the others.
    """
    trial = with_divisions(copied(prepared.model), [(one, np.ones(1)) for one in scalings if not one.before])
    graph = read_graph(trial)
    new = [node for node in graph.nodes if node.output[0] not in prepared.graph.producers]
    types = {node.output[0]: graph.types[node.input[0]] for node in new}
    graph = graph._replace(types=graph.types | types)
    readers = make_plan(graph, observed_tensors(graph), "onnxruntime").readers
    return {node.input[0] for node in new if not readers.get(node.input[0], set()) & {EVERYONE, node.name}}


def with_divisions(model: onnx.ModelProto, divided: Sequence[tuple[Scaling, Array]]) -> onnx.ModelProto:
    """Put a Mul by the inverse factors before the products of each scaling, in place."""
    names = {text for node in all_nodes(model.graph) for text in (*node.input, *node.output, node.name)}
    dtypes = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    before: dict[str, onnx.NodeProto] = {}
    nodes = {node.name: node for node in model.graph.node}
    for scaling, factors in divided:
        activation = scaling.tensors[0]
        result, constant = (unused(f"{activation}_{end}", names) for end in ("smooth", "factors"))
        layers = [nodes[view.node] for _, view in scaling.behind]
        dtype = helper.tensor_dtype_to_np_dtype(dtypes[layers[0].input[1]])
        model.graph.initializer.append(numpy_helper.from_array((1 / factors).astype(dtype), constant))
        name = unused(f"{result}/Mul", names)
        before[layers[0].name] = helper.make_node("Mul", [activation, constant], [result], name)
        for layer in layers:
            layer.input[0] = result
    ordered = [one for node in model.graph.node for one in (before.get(node.name), node) if one is not None]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    return model
