"""Operators with weights or products that no engine's plan covers: they stay in floating point, and are named."""

from collections.abc import Iterator

import onnx

from ...settings import EXCLUDED, WEIGHTED
from ..model.graph import FLOATS, MAX_CHAIN, Graph, node_key
from ..model.operators import attribute, is_excluded
from ..model.signs import ONNX

PRODUCTS = ("LSTM", "GRU", "RNN", "Einsum", "Attention", "DeformConv", "LinearAttention", "CausalConvWithState")
"""Operators of the standard that compute products, and have no place in any plan."""
FUSED = ("MatMul", "Conv", "Gemm", "Attention", "MoE", "LinearClassifier", "LinearRegressor", "SVM")
"""Parts of the names of such operators in other domains, of com.microsoft above all."""
LOOKUPS = ("Gather", "GatherND", "GatherElements")
MOVES = ("Cast", "Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze")


def float_layers(graph: Graph, exclude: tuple[str, ...]) -> dict[str, str]:
    """Return why each operator with weights or products that cannot be quantized stays, by name of the node."""
    found: dict[str, str] = {}
    for node in graph.nodes:
        excluded = is_excluded(graph, node, exclude)
        if reason := _why_float(graph, node):
            found[node.name] = EXCLUDED if excluded else reason
        for path in body_layers(graph, node):
            left_out = excluded or path in exclude
            where = f"the body of {node.op_type} node `{node.name}`"
            found[path] = EXCLUDED if left_out else f"in {where}, and bodies are not quantized"
    return found


def body_layers(graph: Graph, node: onnx.NodeProto, path: str = "") -> Iterator[str]:
    """Yield the paths of the operators with weights or products in the bodies of a node, as `if_node/then/conv`."""
    path = f"{path}{node.name or node_key(node)}/"
    for one in node.attribute:
        for body in (*([one.g] if one.HasField("g") else []), *one.graphs):
            inner = _inner(graph, body)
            for child in body.node:
                here = f"{path}{one.name.removesuffix('_branch')}/"
                if (child.op_type in WEIGHTED and child.domain in ONNX) or _why_float(inner, child):
                    yield f"{here}{child.name or node_key(child)}"
                yield from body_layers(inner, child, here)


def _inner(graph: Graph, body: onnx.GraphProto) -> Graph:
    """Return what a body can read: the constants around it, and its own."""
    constants = graph.initializers | {tensor.name: tensor for tensor in body.initializer}
    producers = graph.producers | {name: node for node in body.node for name in node.output}
    return graph._replace(initializers=constants, producers=producers)


def _why_float(graph: Graph, node: onnx.NodeProto) -> str:
    """Return why a node with weights or products stays in floating point; nothing for all others."""
    kind = node.op_type
    if node.domain not in ONNX:
        weighted = any(part in kind for part in FUSED) or any(_is_weight(graph, name) for name in node.input)
        return f"{kind} of domain `{node.domain}` cannot be quantized" if weighted else ""
    if kind in PRODUCTS:
        return f"{kind} cannot be quantized"
    if kind in LOOKUPS and _is_weight(graph, node.input[0]):
        return f"{kind} reads a table of constants, which cannot be quantized"
    return ""


def _is_weight(graph: Graph, name: str) -> bool:
    """Return whether a tensor is a constant of floats, of two dimensions or more; casts and moves change nothing."""
    for _ in range(MAX_CHAIN):
        producer = graph.producers.get(name)
        tensor: object = graph.initializers.get(name)
        if tensor is None and producer is not None and producer.op_type == "Constant":
            tensor = attribute(producer, "value", None)
        if isinstance(tensor, onnx.TensorProto):
            return tensor.data_type in FLOATS and len(tensor.dims) > 1
        if producer is None or producer.op_type not in MOVES:
            break
        name = producer.input[0]
    return False
