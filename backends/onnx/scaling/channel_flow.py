"""Pairs of layers between which channels can be scaled: everything between commutes with positive factors.

If f(s x) = s f(x) for every s > 0 (ReLU, pooling, Flatten, ...), then dividing the output channels of one layer by s
and multiplying the input channels of the next by s changes nothing. Each tensor on the way must have one reader only.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import onnx

from ..feeds import Array
from ..model.graph import MAX_CHAIN, Graph, to_array
from ..model.operators import attribute, channel_bias, has_constant_weight, sole_consumer

ELEMENTWISE = ("Relu", "LeakyRelu", "PRelu", "Identity", "Dropout")
POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class View(NamedTuple):
    """How the channels of a layer lie in a constant."""

    node: str
    position: int
    shape: tuple[int, int, int, int]
    """To reshape the constant to. Its channels are the first axis (groups) together with `axis`."""
    axis: int
    inverse: bool = False
    """Whether it divides."""
    wide: tuple[int, ...] | None = None
    """The shape that a constant for all channels gets before."""


class Pair(NamedTuple):
    """Two layers, of which the second reads the first."""

    first: View
    added: list[View]
    """The biases on the way."""
    second: View


class Scaling(NamedTuple):
    """Tensors whose channels are scaled together."""

    before: list[View]
    """Constants that take up the inverse factors; empty if there are none."""
    tensors: list[str]
    """Those that are scaled."""
    behind: list[tuple[str, View]]
    """The constants that take the factors back, each with the tensor that is multiplied by it."""
    axis: int
    """Of the channels."""


def find_pairs(graph: Graph) -> list[Pair]:
    """Return the pairs of layers with constant weights, in the order of the graph."""
    found = (_follow(graph, node) for node in graph.nodes if _is_layer(graph, node))
    return [pair for pair in found if pair is not None]


def _is_layer(graph: Graph, node: onnx.NodeProto) -> bool:
    return (
        node.op_type in LAYERS
        and has_constant_weight(graph, node)
        and not attribute(node, "transA", 0)
        and (node.op_type != "MatMul" or len(_shape(graph, node)) == 2)
    )


def _shape(graph: Graph, node: onnx.NodeProto) -> list[int]:
    return list(graph.initializers[node.input[1]].dims)


def _follow(graph: Graph, first: onnx.NodeProto) -> Pair | None:
    """Follow the output of a layer to the next."""
    channels = _channels(graph, first)
    added = [] if len(first.input) < 3 or not first.input[2] else [View(first.name, 2, (1, channels, 1, 1), 1)]
    if added and (channel_bias(graph, first) is None or _size(graph, first.input[2]) != channels):
        return None
    name, last = first.output[0], first.op_type in ("Gemm", "MatMul")
    for _ in range(MAX_CHAIN):
        node = sole_consumer(graph, name)
        if node is None or list(node.input).count(name) > 1 or (node.op_type != "Add" and node.input[0] != name):
            return None
        if node.op_type in LAYERS:
            second = entered(graph, node, name, channels, last)
            return second and Pair(left(graph, first, channels), added, second)
        if node.op_type == "Add":
            position = 1 - list(node.input).index(name)
            if not _is_bias(
                graph, node.input[position], [channels] + [1] * (0 if last else len(_shape(graph, first)) - 2)
            ):
                return None
            added.append(View(node.name, position, (1, channels, 1, 1), 1))
        elif node.op_type in ("Flatten", "Reshape", "Squeeze") and not last and _flattens(graph, node):
            last = True
        elif not (node.op_type in ELEMENTWISE or (node.op_type in POOLS and not last)):
            return None
        name = node.output[0]
    return None


def _channels(graph: Graph, node: onnx.NodeProto) -> int:
    shape = _shape(graph, node)
    if node.op_type == "Conv" or (node.op_type == "Gemm" and attribute(node, "transB", 0)):
        return shape[0]
    return shape[1] * group_count(node)


def group_count(node: onnx.NodeProto) -> int:
    """Return the number of groups of a layer."""
    groups: Any = attribute(node, "group", 1)
    return int(groups)


def _size(graph: Graph, name: str) -> int:
    return int(np.prod(graph.initializers[name].dims))


def _is_bias(graph: Graph, name: str, wanted: list[int]) -> bool:
    """Return whether a constant has this shape, perhaps behind axes of size 1."""
    tensor = graph.initializers.get(name)
    shape = [] if tensor is None else list(tensor.dims)
    return shape[-len(wanted) :] == wanted and np.prod(shape) == wanted[0]


def _flattens(graph: Graph, node: onnx.NodeProto) -> bool:
    """Return whether a node makes one axis of all but the first."""
    if node.op_type == "Flatten":
        return attribute(node, "axis", 1) == 1
    constant = graph.initializers.get(node.input[1]) if len(node.input) > 1 else None
    values = [] if constant is None else to_array(constant).ravel().tolist()
    if node.op_type == "Squeeze":
        return values == [2, 3]
    return values == [0, -1] and not attribute(node, "allowzero", 0)


def left(graph: Graph, node: onnx.NodeProto, channels: int) -> View:
    """Return how the output channels lie in the weight of a layer."""
    shape, size = _shape(graph, node), _size(graph, node.input[1])
    if shape[0] == channels and (node.op_type == "Conv" or attribute(node, "transB", 0)):
        return View(node.name, 1, (1, channels, size // channels, 1), 1)
    groups = group_count(node)
    rest = size // (shape[0] * shape[1])
    return View(node.name, 1, (groups, shape[0] // groups, shape[1], rest), 2)


def entered(graph: Graph, node: onnx.NodeProto, name: str, channels: int, last: bool) -> View | None:
    """Return how the input channels lie in the weight of a layer, if it reads a tensor of that many."""
    if not _is_layer(graph, node) or node.input[0] != name or last != (node.op_type in ("Gemm", "MatMul")):
        return None
    shape, size, groups = _shape(graph, node), _size(graph, node.input[1]), group_count(node)
    if node.op_type == "Conv":
        fits = shape[1] * groups == channels
        return (
            View(node.name, 1, (groups, shape[0] // groups, shape[1], size // (shape[0] * shape[1])), 2)
            if fits
            else None
        )
    inputs = shape[1] if attribute(node, "transB", 0) else shape[0]
    if inputs % channels or (node.op_type == "ConvTranspose" and inputs != channels):
        return None
    if attribute(node, "transB", 0):
        return View(node.name, 1, (1, shape[0], channels, inputs // channels), 2)
    return View(node.name, 1, (1, channels, size // channels, 1), 1)


class Constants:
    """The constants of a graph, while their channels are multiplied."""

    def __init__(self, graph: Graph) -> None:
        self._graph, self._nodes = graph, {node.name: node for node in graph.nodes}
        self.changed: dict[tuple[str, int], Array] = {}

    def grouped(self, view: View) -> Array:
        """Return a constant in float64, in the shape of the view."""
        return self._values(view).astype(np.float64).reshape(view.shape)

    def by_input(self, view: View) -> Array:
        """Return a weight, shape (groups, outputs, inputs, positions), from a view of its inputs."""
        grouped = self.grouped(view)
        return grouped if view.axis == 2 else grouped.swapaxes(1, 2)

    def ranges(self, view: View) -> Array:
        """Return the largest absolute value of each channel."""
        largest: Array = np.abs(self.grouped(view)).max((3 - view.axis, 3)).ravel()
        return largest

    def multiply(self, views: Iterable[View], factors: Array) -> None:
        """Multiply the channels of constants."""
        for view in views:
            shape = [view.shape[0], 1, 1, 1]
            shape[view.axis] = view.shape[view.axis]
            wide = self.grouped(view) * (1 / factors if view.inverse else factors).reshape(shape)
            old = self._values(view)
            self.changed[view.node, view.position] = wide.reshape(old.shape).astype(old.dtype)

    def _values(self, view: View) -> Array:
        found = self.changed.get((view.node, view.position))
        if found is not None:
            return found
        values = to_array(self._graph.initializers[self._nodes[view.node].input[view.position]])
        return np.broadcast_to(values.reshape(()), view.wide) if view.wide and values.size == 1 else values
