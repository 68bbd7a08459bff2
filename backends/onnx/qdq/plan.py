"""What is quantized: the plan of an engine's rules. The model is not changed yet."""

from collections.abc import Set as AbstractSet
from typing import NamedTuple

import onnx

from ...settings import EXCLUDED
from ..model.graph import Graph
from ..model.operators import MOVING, activations, has_constant_weight, is_excluded, weight_axis

EVERYONE = "*"


class Plan(NamedTuple):
    """Which tensors are quantized and dequantized, and which nodes read the result."""

    readers: dict[str, set[str]]
    """Names of the nodes that read the dequantized values, by activation; EVERYONE for all and the graph's output."""
    weights: dict[str, int | None]
    """The axis of output channels of the weight of each quantized layer, by name of the node; None for one scale."""
    shared: list[tuple[str, ...]]
    """Activations that must have one scale."""
    skipped: dict[str, str]
    """Why layers stay in floating point, by node name."""
    biased: AbstractSet[str] = frozenset()
    """Layers that get a bias that changes nothing, by node name."""
    operands: AbstractSet[str] = frozenset()
    """Names of sums and products of an activation and a constant, which is quantized too."""
    tables: AbstractSet[str] = frozenset()
    """Names of Gather nodes that read integers from a table, which are dequantized behind them."""


def why_not(graph: Graph, node: onnx.NodeProto, known: set[str], exclude: tuple[str, ...]) -> str:
    """Return why a layer cannot be quantized, or an empty string."""
    inputs = activations(graph, node)
    unknown = [name for name in inputs if name not in known]
    if is_excluded(graph, node, exclude):
        return EXCLUDED
    if untyped := [name for name in node.input[:2] if name not in graph.initializers and not graph.types.get(name)]:
        return f"the type of its input `{untyped[0]}` is unknown"
    if not has_constant_weight(graph, node) and len(set(node.input[:2]) & set(inputs)) < len(set(node.input[:2])):
        return "its weight is not a constant second input"
    if unknown:
        return f"no threshold is known for its input `{unknown[0]}`"
    wide = [name for name in inputs if graph.types[name] not in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)]
    return f"its input `{wide[0]}` is neither float32 nor float16" if wide else ""


def add_layer(graph: Graph, plan: Plan, node: onnx.NodeProto) -> None:
    """Quantize the weight of a layer, if that is a constant."""
    if has_constant_weight(graph, node):
        plan.weights[node.name] = weight_axis(graph, node)


def share_moved(graph: Graph, plan: Plan) -> None:
    """Share one scale between input and output of nodes that only move values, if both are quantized."""
    for node in graph.nodes:
        if node.op_type in MOVING and {node.input[0], node.output[0]} <= plan.readers.keys():
            plan.shared.append((node.input[0], node.output[0]))
