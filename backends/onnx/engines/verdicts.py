"""What became of each node of a model in an engine, also of those that the engine made part of another."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import onnx

from ..model.graph import Graph, node_key
from .quantizer_nodes import DEQUANTIZE, QUANTIZE, dequantizer, label

REMOVABLE = (
    *("Relu", "Clip", "Identity", "Dropout", "Cast"),
    *("Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"),
)
"""Nodes that engines leave out where a quantizer does their work, or where they change no value."""


class Verdict(NamedTuple):
    """Whether an engine executes a node in int8."""

    int8: bool
    reason: str
    """Why not; or as what."""


class Fate(NamedTuple):
    """The kernel that an engine executes a node with."""

    kernel: str
    int8: bool
    fused: bool
    """Whether it may do the work of other nodes as well."""


def follow_fused(graph: Graph, fates: Mapping[str, Fate], node: onnx.NodeProto, engine: str) -> Verdict:
    """Return the verdict on a node that the engine has no kernel of its own for."""
    host = next(_hosts(graph, fates, node), None)
    if host is not None:
        fate = fates[node_key(host)]
        where = f"part of `{label(host)}`" + ("" if fate.int8 else ", which runs in floating point")
        return Verdict(fate.int8, f"{where} ({fate.kernel})")
    if node.op_type not in REMOVABLE:
        return Verdict(False, f"{engine} replaced it by other operators, in floating point")
    if dequantizer(graph, node.input[0]) is None:
        return Verdict(False, f"{engine} removed it; what it was given is floating point")
    return Verdict(True, f"{engine} removed it: its quantizers do its work")


def _hosts(graph: Graph, fates: Mapping[str, Fate], node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes that may have taken this one in: those before it, through others that are gone, then behind."""
    before = [graph.producers[name] for name in node.input if name in graph.producers]
    before = [other for other in before if other.op_type not in (QUANTIZE, DEQUANTIZE)]
    yield from (other for other in before if node_key(other) in fates and fates[node_key(other)].fused)
    for other in before:
        if node_key(other) not in fates:
            yield from _hosts(graph, fates, other)
    behind = [other for name in node.output for other in graph.consumers.get(name, [])]
    yield from (other for other in behind if node_key(other) in fates and fates[node_key(other)].fused)
