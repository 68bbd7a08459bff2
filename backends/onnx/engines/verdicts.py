"""Verdicts on nodes that an engine fused into others or removed."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import onnx

from ..model.graph import Graph, node_key
from .quantizer_nodes import DEQUANTIZE, QUANTIZE, dequantizer, label

REMOVABLE = (
    *("Relu", "Clip", "Identity", "Dropout", "Cast"),
    *("Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"),
)
"""Operators that engines remove if a quantizer replaces them, or if they change no values."""


class Verdict(NamedTuple):
    """Whether an engine runs a node in int8."""

    int8: bool
    reason: str
    """The kernel that runs it, or why it is not int8."""


class Kernel(NamedTuple):
    """The kernel that runs a node."""

    name: str
    int8: bool
    fused: bool
    """Whether it may also run other nodes."""


def follow_fused(graph: Graph, kernels: Mapping[str, Kernel], node: onnx.NodeProto, engine: str) -> Verdict:
    """Return the verdict on a node for which the engine has no separate kernel."""
    host = next(_hosts(graph, kernels, node), None)
    if host is not None:
        kernel = kernels[node_key(host)]
        where = f"part of `{label(host)}`" + ("" if kernel.int8 else ", which runs in floating point")
        return Verdict(kernel.int8, f"{where} ({kernel.name})")
    if node.op_type not in REMOVABLE:
        return Verdict(False, f"{engine} replaced it by other operators, in floating point")
    if dequantizer(graph, node.input[0]) is None:
        return Verdict(False, f"{engine} removed it; its input is in floating point")
    return Verdict(True, f"{engine} removed it: its quantizers replace it")


def _hosts(graph: Graph, kernels: Mapping[str, Kernel], node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes that this one may be fused into: those before it, past removed ones, then those after it."""
    before = [graph.producers[name] for name in node.input if name in graph.producers]
    before = [other for other in before if other.op_type not in (QUANTIZE, DEQUANTIZE)]
    yield from (other for other in before if node_key(other) in kernels and kernels[node_key(other)].fused)
    for other in before:
        if node_key(other) not in kernels:
            yield from _hosts(graph, kernels, other)
    behind = [other for name in node.output for other in graph.consumers.get(name, [])]
    yield from (other for other in behind if node_key(other) in kernels and kernels[node_key(other)].fused)
