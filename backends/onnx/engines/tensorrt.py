"""What TensorRT would run in int8 according to its documented rules; TensorRT itself needs a GPU and is not used."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import onnx

from ...settings import WEIGHTED
from ..model.graph import Graph, node_key, read_graph
from ..model.loading import blaming_invalid_model
from ..model.operators import MOVING
from .inspected_model import load
from .quantizer_nodes import DEQUANTIZE, QUANTIZE, dequantizer, follow, label, parameters
from .tensorrt_rules import FOLLOWERS, RULES, is_dequantized, layer_of, reaches_quantizer
from .verdicts import Verdict

_PER_AXIS_OPSET = 13


class Violation(NamedTuple):
    """A rule of TensorRT that a model breaks, from :func:`check_tensorrt`."""

    rule: str
    node: str
    """Name of the node, or of its output if it has none."""
    message: str


def check_tensorrt(model: str | Path | onnx.ModelProto) -> list[Violation]:
    """Check a model with Q/DQ against the rules that TensorRT documents for explicit quantization.

    Parameters
    ----------
    model : path or onnx.ModelProto
        With QuantizeLinear and DequantizeLinear nodes.

    Returns
    -------
    list of Violation
        In the order of the nodes; empty if all rules hold. A layer without any quantizer breaks no rule.

    Raises
    ------
    InvalidInputError
        For an invalid model. A missing file raises FileNotFoundError.

    Notes
    -----
    The rules and their sources are listed in ``klquant.backends.onnx.engines.tensorrt_rules.RULES``. If a rule on a
    single quantizer (type, scale, zero point) is broken, TensorRT rejects the model or computes something else. If a
    rule on the place of quantizers is broken, TensorRT runs that part in floating point, which costs speed.
    """
    model = load(model)
    with blaming_invalid_model(model):
        return [violation for _, violation in _violations(model, read_graph(model))]


def verdicts(model: onnx.ModelProto, graph: Graph, nodes: Iterable[onnx.NodeProto]) -> dict[str, Verdict]:
    """Return the verdicts of the rules, by node key; nodes next to a broken quantizer count as broken."""
    broken: dict[str, str] = {}
    for node, violation in _violations(model, graph):
        broken.setdefault(node_key(node), f"{label(node)}: {violation.message}")
    found: dict[str, Verdict] = {}
    for node in nodes:
        reasons = [broken[node_key(one)] for one in (node, *_next_to(graph, node)) if node_key(one) in broken]
        own = reasons[0].removeprefix(f"{label(node)}: ") if reasons else ""
        found[node_key(node)] = Verdict(False, own) if own else _placed(graph, node, found)
    return found


def _violations(model: onnx.ModelProto, graph: Graph) -> Iterator[tuple[onnx.NodeProto, Violation]]:
    for node in graph.nodes:
        messages = [(rule.__name__, message) for rule, _ in RULES for message in rule(graph, node)]
        for rule, message in (*messages, *_per_axis_opset(model, graph, node)):
            yield node, Violation(rule, label(node), message)


def _per_axis_opset(model: onnx.ModelProto, graph: Graph, node: onnx.NodeProto) -> Iterator[tuple[str, str]]:
    """Use scales along an axis only with an opset that supports them."""
    opset = next((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), _PER_AXIS_OPSET)
    scale = parameters(graph, node).scale if node.op_type in (QUANTIZE, DEQUANTIZE) else None
    if opset < _PER_AXIS_OPSET and scale is not None and scale.size > 1:
        yield "per_axis_opset", f"scales along an axis need opset {_PER_AXIS_OPSET}, got {opset}"


def _next_to(graph: Graph, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """Yield the quantizers and dequantizers before and after a node."""
    for source in (dequantizer(graph, name) for name in node.input):
        if source is not None:
            yield source
            before = graph.producers.get(source.input[0])
            if before is not None and before.op_type == QUANTIZE:
                yield before
    for name in node.output:
        yield from (one for one in follow(graph, name, FOLLOWERS).consumers if one.op_type == QUANTIZE)


def _placed(graph: Graph, node: onnx.NodeProto, found: dict[str, Verdict]) -> Verdict:
    """Return the verdict on a node that breaks no rule."""
    host = _host(graph, node)
    if host is not None and node_key(host) in found:
        int8 = found[node_key(host)].int8
        return Verdict(int8, f"part of `{label(host)}`" + ("" if int8 else ", which runs in floating point"))
    if any(is_dequantized(graph, name) for name in node.input[:1] if node.op_type in WEIGHTED):
        return Verdict(True, "its inputs are quantized")
    if node.op_type not in WEIGHTED and any(is_dequantized(graph, name) for name in node.input):
        return Verdict(True, "its inputs and its output are quantized")
    if node.op_type in (*MOVING, "Concat") and reaches_quantizer(graph, node.output[0]):
        return Verdict(True, "the quantizer after it can move before it")
    return Verdict(False, "none of its inputs comes from a DequantizeLinear")


def _host(graph: Graph, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """Return the layer or sum that a node is fused into."""
    if node.op_type == "Add":
        return next((layer for name in node.input if (layer := layer_of(graph, name)) is not None), None)
    producer = graph.producers.get(node.input[0])
    hosts = (*WEIGHTED, *FOLLOWERS, "Add")
    return producer if node.op_type in FOLLOWERS and producer is not None and producer.op_type in hosts else None
