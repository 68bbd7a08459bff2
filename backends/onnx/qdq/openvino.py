"""What OpenVINO 2026.4 runs in floating point, or computes wrongly, and how to avoid it.

OpenVINO multiplies the integers of a layer by its scales, and moves that product behind the nodes that follow. It
loses the product where a convolution without a bias has several readers (a LayerNormalization counts as several), and
loses the channels that its scales belong to where a later node removes a dimension.
"""

import numpy as np
import onnx

from ...settings import WEIGHTED
from ..model.graph import MAX_CHAIN, Graph, to_array
from ..model.operators import MOVING, RECTIFIERS, attribute
from .plan import Plan

CONVOLUTIONS = ("Conv", "ConvTranspose")
DOUBLE = onnx.TensorProto.DOUBLE
EXTREMES = ("ReduceMax", "ReduceMin", "GlobalMaxPool")
PASSED = (*MOVING, *RECTIFIERS, "Identity", "Dropout", "Slice", "Split", "Concat")
"""Operators behind which OpenVINO moves the product."""


def adapted(graph: Graph, plan: Plan) -> Plan:
    """Return the plan without layers that OpenVINO runs in floating point, and such that it computes the rest right."""
    layers = [node for node in graph.nodes if node.name in plan.weights]
    skipped = {node.name: reason for node in layers if (reason := _why_float(graph, node))}
    kept = [node for node in layers if node.name not in skipped]
    readers = {name: nodes - skipped.keys() for name, nodes in plan.readers.items()}
    return plan._replace(
        readers={name: nodes for name, nodes in readers.items() if nodes},
        weights={node.name: None if _loses_axis(graph, node) else plan.weights[node.name] for node in kept},
        skipped=plan.skipped | skipped,
        biased={node.name for node in kept if node.op_type in CONVOLUTIONS and _needs_bias(graph, node)},
    )


def _why_float(graph: Graph, node: onnx.NodeProto) -> str:
    if node.op_type == "ConvTranspose" and attribute(node, "group", 1) != 1:
        return "OpenVINO has no INT8 kernel for a ConvTranspose with groups"
    stacked = np.prod(graph.initializers[node.input[1]].dims[:-2]) > 1
    if node.op_type == "MatMul" and stacked and _is_spread(graph, node):
        return f"OpenVINO may lose the scale of the stacked matrices `{node.input[1]}`"
    for name in node.input[:2]:
        source = graph.producers.get(name)
        if source is not None and source.op_type == "Cast" and graph.types.get(source.input[0]) == DOUBLE:
            return f"OpenVINO cannot load a quantizer of `{name}`, which is cast from float64"
        if extreme := _extreme(graph, name):
            return f"OpenVINO computes {extreme.op_type} `{extreme.name}` wrongly with a quantizer behind it"
    return ""


def _extreme(graph: Graph, name: str) -> onnx.NodeProto | None:
    """Return the reduction that a tensor comes from, if it is one that OpenVINO joins with a quantizer to its harm."""
    for _ in range(MAX_CHAIN):
        node = graph.producers.get(name)
        if node is None or node.op_type in EXTREMES:
            return node
        if node.op_type not in (*MOVING, *RECTIFIERS):
            break
        name = node.input[0]
    return None


def _needs_bias(graph: Graph, node: onnx.NodeProto) -> bool:
    """Return whether OpenVINO may lose the scales of a convolution: without a bias, or with zeros, which it removes."""
    bias = graph.initializers.get(node.input[2]) if len(node.input) > 2 else None
    without = len(node.input) < 3 or (bias is not None and not to_array(bias).any())
    return without and _is_spread(graph, node)


def _is_spread(graph: Graph, node: onnx.NodeProto) -> bool:
    """Return whether several kernels may read the result of a layer."""
    readers = graph.consumers.get(node.output[0], [])
    return len(readers) > 1 or any(reader.op_type not in (*RECTIFIERS, *WEIGHTED) for reader in readers)


def _loses_axis(graph: Graph, node: onnx.NodeProto) -> bool:
    """Return whether OpenVINO would not find the channels of a layer's result again, by which its scales go."""
    pending = [node.output[0]]
    for name in pending:  # it grows meanwhile
        for reader in graph.consumers.get(name, []):
            reduces = reader.op_type.startswith("Reduce") and not attribute(reader, "keepdims", 1)
            selects = reader.op_type == "Gather" and graph.ranks.get(reader.input[1]) == 0
            if selects or (reduces and node.op_type not in CONVOLUTIONS):
                return True
            if reader.op_type in PASSED and len(pending) < MAX_CHAIN:
                pending.extend(reader.output)
    return graph.ranks.get(node.input[0]) == 1
