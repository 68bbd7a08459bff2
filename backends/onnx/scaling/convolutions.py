"""Where the channels of activations can be scaled in convolutional networks, at no cost.

Constants in front take up the inverse factors: the weight of a convolution, or a Mul and the Add behind it. Constants
behind take the factors back: weights again, or another such Mul. Whatever lies between commutes with positive factors.
An activation may have several readers, as in squeeze-and-excitation, if all of them end in such constants.
"""

from typing import NamedTuple

import onnx

from ..model.graph import Graph
from ..model.operators import constant_of_channels, has_constant_weight, output_channels, sole_consumer
from .channel_flow import ELEMENTWISE, POOLS, Scaling, View, entered, group_count, left

CONVOLUTIONS = ("Conv", "ConvTranspose")


class _Flow(NamedTuple):
    """Where the factors of a tensor go."""

    tensors: list[str]
    added: list[onnx.NodeProto]
    """Nodes that add constants, which are scaled too."""
    ends: list[tuple[str, onnx.NodeProto]]
    """Nodes with the constants that take the factors back, each with the tensor that it reads."""


def find_convolutions(graph: Graph) -> list[Scaling]:
    """Return what can be scaled in front of convolutions and behind them. No tensor is in two of them."""
    found, taken = list[Scaling](), set[str]()
    for node in graph.nodes:
        one = _scaling(graph, node) if _is_convolution(graph, node) or _is_affine(graph, node) else None
        if one is not None and one.behind and not taken & {*one.tensors}:
            found.append(one)
            taken.update(one.tensors)
    return found


def _scaling(graph: Graph, first: onnx.NodeProto) -> Scaling | None:
    """Return what is scaled together with the output of a node."""
    flow = _follow(graph, first.output[0])
    shape = None if flow is None else _shape(graph, first, [node for _, node in flow.ends])
    if flow is None or shape is None or any(graph.ranks.get(name) != len(shape) + 1 for name in flow.tensors):
        return None
    before = [_values(graph, node, shape) for node in flow.added]
    if not _is_convolution(graph, first):
        before.append(_values(graph, first, shape))
    elif len(first.input) > 2 and first.input[2]:
        before.append(_along(graph, first, 2, shape[:1]))
    behind = [(name, _taken(graph, node, name, shape)) for name, node in flow.ends]
    scaled, taken = [view for view in before if view], [(name, view) for name, view in behind if view]
    if len(scaled) < len(before) or len(taken) < len(behind):
        return None
    if _is_convolution(graph, first):
        scaled.append(left(graph, first, shape[0]))
    return Scaling(scaled, flow.tensors, taken, axis=1)


def _follow(graph: Graph, start: str) -> _Flow | None:
    """Follow a tensor to the constants that take its factors back; None if anything else depends on them.

    That includes a tensor that is reached on two ways: it would get the factors twice.
    """
    flow, waiting, factors = _Flow([], [], []), [start], set[str]()
    while waiting:
        name = waiting.pop()
        if name in graph.outputs or name in flow.tensors:
            return None
        flow.tensors.append(name)
        for node in graph.consumers.get(name, []):
            others = [one for one in node.input if one != name]
            constant = _constant(graph, node)
            if (node.input[0] == name and _is_convolution(graph, node)) or _is_affine(graph, node):
                flow.ends.append((name, node))
                continue
            if node.op_type == "Add" and constant is not None:
                flow.added.append(node)
            elif node.op_type == "Mul" and constant is None and len(others) == 1:
                factors.add(others[0])
            elif not (node.op_type == "Mul" and constant is not None) and not _is_homogeneous(node, name):
                return None
            waiting.append(node.output[0])
    return flow if all(graph.ranks.get(name) == graph.ranks.get(start) for name in factors) else None


def _is_homogeneous(node: onnx.NodeProto, name: str) -> bool:
    """Return whether f(s x) = s f(x) holds for positive factors of the channels of x, the tensor of this name."""
    return node.op_type in (*ELEMENTWISE, *POOLS) and list(node.input).count(name) == 1 and node.input[0] == name


def _is_convolution(graph: Graph, node: onnx.NodeProto) -> bool:
    return node.op_type in CONVOLUTIONS and has_constant_weight(graph, node)


def _is_affine(graph: Graph, node: onnx.NodeProto) -> bool:
    """Return whether a node multiplies by a constant, and its only reader adds one.

    Another Mul may be part of a GELU or HardSwish, which engines compute in one node as long as it has one value.
    """
    after = sole_consumer(graph, node.output[0]) if node.op_type == "Mul" else None
    both = after is not None and after.op_type == "Add" and _constant(graph, after) is not None
    return both and _constant(graph, node) is not None


def _shape(graph: Graph, first: onnx.NodeProto, ends: list[onnx.NodeProto]) -> tuple[int, ...] | None:
    """Return the shape of one value for each channel, from the weight of a convolution that writes or reads them."""
    for node in (first, *ends):
        if _is_convolution(graph, node):
            dims = graph.initializers[node.input[1]].dims
            reads = dims[0] if node.op_type == "ConvTranspose" else dims[1] * group_count(node)
            return (output_channels(graph, node) if node is first else reads, *[1] * (len(dims) - 2))
    return None


def _taken(graph: Graph, node: onnx.NodeProto, name: str, shape: tuple[int, ...]) -> View | None:
    """Return the constant of a node that takes the factors of a tensor back."""
    if _is_convolution(graph, node):
        return entered(graph, node, name, shape[0], last=False)
    found = _values(graph, node, shape)
    return found and found._replace(shape=(shape[0], 1, 1, 1), axis=2)


def _values(graph: Graph, node: onnx.NodeProto, shape: tuple[int, ...]) -> View | None:
    """Return the constant of a Mul or Add."""
    position = _constant(graph, node)
    return None if position is None else _along(graph, node, position, shape)


def _along(graph: Graph, node: onnx.NodeProto, position: int, shape: tuple[int, ...]) -> View | None:
    """Return a constant with one value for each channel, or for all; None if it has another shape."""
    fits = constant_of_channels(graph, node, position, shape) is not None
    return View(node.name, position, (1, shape[0], 1, 1), 1, wide=shape) if fits else None


def _constant(graph: Graph, node: onnx.NodeProto) -> int | None:
    """Return which of two inputs is constant."""
    found = [k for k, name in enumerate(node.input) if name in graph.initializers]
    return found[0] if len(found) == 1 and len(node.input) == 2 else None
