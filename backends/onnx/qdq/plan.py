"""Plan where quantizers go, by the rules of an engine. The model is not changed yet.

``explicit`` plans for TensorRT and OpenVINO, which quantize where the model says and fuse the rest themselves.
``operators`` plans for onnxruntime, which runs an operator in INT8 only between dequantizers and a quantizer.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import onnx

from ...settings import EXCLUDED, WEIGHTED, Engine
from ..model.graph import Graph
from ..model.operators import (
    COMBINING,
    CURVES,
    MOVING,
    activations,
    attribute,
    is_excluded,
    rectified,
    sole_consumer,
    weight_axis,
)

EVERYONE = "*"
NO_KERNEL = ("ConvTranspose",)  # onnxruntime has no INT8 kernel for these
FLOAT_OUTPUT = ("Gemm", "MatMul")  # onnxruntime's INT8 kernels for these can output floating point
BETWEEN = (
    *MOVING,
    "AveragePool",
    "GlobalAveragePool",
    *CURVES,
    *COMBINING,
)  # these have INT8 kernels


class Plan(NamedTuple):
    """Which tensors are quantized and dequantized, and which nodes read the result."""

    readers: dict[str, set[str]]
    """Names of the nodes that read the dequantized values, by activation; EVERYONE means all and the graph output."""
    weights: dict[str, int]
    """The axis of output channels of each quantized weight, by node name."""
    shared: list[tuple[str, ...]]
    """Activations that must have one scale."""
    skipped: dict[str, str]
    """Why layers stay in floating point, by node name."""


def make_plan(graph: Graph, thresholds: Iterable[str], engine: Engine, exclude: tuple[str, ...] = ()) -> Plan:
    """Return the plan for an engine, given the names of the tensors with a threshold."""
    if engine == "onnxruntime":
        return operators(graph, thresholds, exclude)
    return explicit(graph, thresholds, exclude, layers_only=engine == "openvino")


def explicit(graph: Graph, thresholds: Iterable[str], exclude: tuple[str, ...], *, layers_only: bool) -> Plan:
    """Quantize the inputs of layers and, unless `layers_only`, residual shortcuts and concatenations."""
    known = set(thresholds)
    plan = Plan({}, {}, [], {})
    for node in (node for node in graph.nodes if node.op_type in WEIGHTED):
        if reason := _why_not(graph, node, known, exclude):
            plan.skipped[node.name] = reason
            continue
        _add_layer(graph, plan, node)
        for name in activations(graph, node):
            plan.readers.setdefault(name, set()).add(node.name)
    if not layers_only:
        depth = _depths(graph)
        for node in graph.nodes:
            if not is_excluded(graph, node, exclude):
                _add_sum(graph, plan, node, known, depth)
                _add_concatenation(graph, plan, node, known)
        _share_moved(graph, plan)
    return plan


def _why_not(graph: Graph, node: onnx.NodeProto, known: set[str], exclude: tuple[str, ...]) -> str:
    """Return why a layer cannot be quantized, or an empty string."""
    inputs = activations(graph, node)
    unknown = [name for name in inputs if name not in known]
    if is_excluded(graph, node, exclude):
        return EXCLUDED
    if weight_axis(graph, node) is None and len(set(node.input[:2]) & set(inputs)) < len(set(node.input[:2])):
        return "its weight is not a constant second input"
    if unknown:
        return f"no threshold is known for its input `{unknown[0]}`"
    wide = [name for name in inputs if graph.types[name] not in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)]
    return f"its input `{wide[0]}` is neither float32 nor float16" if wide else ""


def _add_layer(graph: Graph, plan: Plan, node: onnx.NodeProto) -> None:
    axis = weight_axis(graph, node)
    if axis is not None:
        plan.weights[node.name] = axis


def _add_sum(graph: Graph, plan: Plan, node: onnx.NodeProto, known: set[str], depth: Mapping[str, int]) -> None:
    """Quantize the shortcut of a residual sum: the input that is not from a layer, or is from the shallower one."""
    inputs = activations(graph, node)
    if node.op_type != "Add" or len(inputs) != 2:
        return
    branches = [name for name in inputs if _is_branch(graph, plan, name)]
    shortcuts = [name for name in inputs if name not in branches] or [min(inputs, key=lambda name: depth[name])]
    if branches and shortcuts[0] in known:
        plan.readers.setdefault(shortcuts[0], set()).add(node.name)


def _is_branch(graph: Graph, plan: Plan, name: str) -> bool:
    """Return whether this tensor comes from a quantized layer and only the sum reads it."""
    producer = graph.producers.get(name)
    quantized = producer is not None and producer.op_type in WEIGHTED and producer.name not in plan.skipped
    return quantized and sole_consumer(graph, name) is not None


def _depths(graph: Graph) -> dict[str, int]:
    """Return the largest number of layers on a path to each tensor."""
    depth = dict.fromkeys(graph.inputs, 0)
    for node in graph.nodes:
        deepest = max((depth.get(name, 0) for name in node.input), default=0)
        depth |= dict.fromkeys(node.output, deepest + (node.op_type in WEIGHTED))
    return depth


def _add_concatenation(graph: Graph, plan: Plan, node: onnx.NodeProto, known: set[str]) -> None:
    """Quantize the inputs of a concatenation with a quantized output, all with its scale."""
    inputs = activations(graph, node)
    if node.op_type == "Concat" and node.output[0] in plan.readers and known.issuperset(inputs):
        plan.shared.append((*inputs, node.output[0]))
        for name in inputs:
            plan.readers.setdefault(name, set()).add(node.name)


def operators(graph: Graph, thresholds: Iterable[str], exclude: tuple[str, ...]) -> Plan:
    """Quantize inputs and output of each layer, and of the operators between layers that have INT8 kernels."""
    known = set(thresholds)
    plan = Plan({}, {}, [], {})
    for node in (node for node in graph.nodes if node.op_type in WEIGHTED):
        reason = _why_not(graph, node, known, exclude) or _why_no_kernel(graph, node, known)
        if reason:
            plan.skipped[node.name] = reason
        else:
            _add_layer(graph, plan, node)
            _quantize_around(graph, plan, node, known)
    for node in (node for node in graph.nodes if node.op_type in BETWEEN):
        possible = _all_quantized(plan, node) and rectified(graph, node.output[0]) in known
        if possible and not is_excluded(graph, node, exclude):
            _quantize_around(graph, plan, node, known)
    _share_moved(graph, plan)
    return plan


def _quantize_around(graph: Graph, plan: Plan, node: onnx.NodeProto, known: set[str]) -> None:
    """Quantize the inputs and the output of a node; a product that is a graph output stays in floating point."""
    output = rectified(graph, node.output[0])
    optional = node.op_type in FLOAT_OUTPUT and (output in graph.outputs or output not in known)
    for name in (*activations(graph, node), *([] if optional else [output])):
        plan.readers[name] = {EVERYONE}


def _why_no_kernel(graph: Graph, node: onnx.NodeProto, known: set[str]) -> str:
    output = rectified(graph, node.output[0])
    if node.op_type in NO_KERNEL:
        return f"onnxruntime has no INT8 kernel for {node.op_type}"
    if any(attribute(node, name, 1.0) != 1.0 for name in ("alpha", "beta")):
        return "onnxruntime has no INT8 kernel for a Gemm with alpha or beta other than 1"
    unknown = output not in known and node.op_type not in FLOAT_OUTPUT
    return f"no threshold is known for its output `{output}`" if unknown else ""


def _all_quantized(plan: Plan, node: onnx.NodeProto) -> bool:
    """Return whether all activations that a node reads are quantized already."""
    inputs = node.input if node.op_type in COMBINING else node.input[:1]
    return all(name in plan.readers for name in inputs)


def _share_moved(graph: Graph, plan: Plan) -> None:
    """Share one scale between input and output of nodes that only move values, if both are quantized."""
    for node in graph.nodes:
        if node.op_type in MOVING and {node.input[0], node.output[0]} <= plan.readers.keys():
            plan.shared.append((node.input[0], node.output[0]))
