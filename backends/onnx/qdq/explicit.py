"""Rules of TensorRT and OpenVINO, which quantize where the model says and fuse the rest themselves."""

from collections.abc import Iterable, Mapping

import onnx

from ...settings import WEIGHTED
from ..model.graph import Graph
from ..model.operators import activations, is_excluded, sole_consumer
from ..model.signs import ONNX
from .plan import Plan, add_layer, share_moved, why_not


def explicit(graph: Graph, thresholds: Iterable[str], exclude: tuple[str, ...], *, layers_only: bool) -> Plan:
    """Quantize the inputs of layers and, unless `layers_only`, residual shortcuts and concatenations."""
    known = set(thresholds)
    plan = Plan({}, {}, [], {})
    for node in (node for node in graph.nodes if node.op_type in WEIGHTED and node.domain in ONNX):
        if reason := why_not(graph, node, known, exclude):
            plan.skipped[node.name] = reason
            continue
        add_layer(graph, plan, node)
        for name in activations(graph, node):
            plan.readers.setdefault(name, set()).add(node.name)
    if not layers_only:
        depth = _depths(graph)
        for node in graph.nodes:
            if not is_excluded(graph, node, exclude):
                _add_sum(graph, plan, node, known, depth)
                _add_concatenation(graph, plan, node, known)
        share_moved(graph, plan)
    return plan


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
    constants = not set(node.input).issubset(inputs)
    if node.op_type == "Concat" and node.output[0] in plan.readers and known.issuperset(inputs) and not constants:
        plan.shared.append((*inputs, node.output[0]))
        for name in inputs:
            plan.readers.setdefault(name, set()).add(node.name)
