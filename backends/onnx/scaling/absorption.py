"""Constants that can take up a factor for each channel of a tensor, so that scaling it costs no node."""

import numpy as np
import onnx

from ..model.graph import MAX_CHAIN, Graph
from ..model.operators import attribute, has_constant_weight, sole_consumer
from .channel_flow import View

NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
"""Operators that multiply the normalized channels by their second input, and add the third."""
HOMOGENEOUS = ("Relu", "LeakyRelu", "Identity", "Dropout")
"""Operators f with f(s x) = s f(x) for s > 0."""


def find_views(graph: Graph, name: str, channels: int) -> list[View] | None:
    """Return the constants to be multiplied so that this tensor is; None if there are none.

    The channels are the last axis. The tensor itself may have any readers, but what is scaled on the way to it may not.
    """
    found: list[View] = []
    for _ in range(MAX_CHAIN):
        node = graph.producers.get(name)
        if node is None or name != node.output[0]:
            return None
        if (ends := _ends(graph, node, channels)) is not None:
            return found + ends
        if node.op_type == "Add" and (position := _vector(graph, node, channels)) is not None:
            found.append(_along(node, position, channels))
            name = node.input[1 - position]
        elif node.op_type in HOMOGENEOUS:
            name = node.input[0]
        else:
            return None
        if (only := sole_consumer(graph, name)) is None or only.name != node.name:
            return None
    return None


def _ends(graph: Graph, node: onnx.NodeProto, channels: int) -> list[View] | None:
    """Return the constants of a node that scale its output, whatever comes in."""
    if node.op_type in NORMS:
        last = attribute(node, "axis", -1) == -1
        given = [position for position in (1, 2) if len(node.input) > position and node.input[position]]
        fits = last and given and all(_shape(graph, node.input[k]) == [channels] for k in given)
        return [_along(node, position, channels) for position in given] if fits else None
    if node.op_type in ("Mul", "Div") and (position := _vector(graph, node, channels)) is not None:
        divides = node.op_type == "Div"
        return [_along(node, position, channels, inverse=divides)] if position == 1 or not divides else None
    if node.op_type in ("MatMul", "Gemm") and has_constant_weight(graph, node):
        return _of_product(graph, node, channels)
    return None


def _of_product(graph: Graph, node: onnx.NodeProto, channels: int) -> list[View] | None:
    shape, transposed = _shape(graph, node.input[1]) or [], bool(attribute(node, "transB", 0))
    if len(shape) != 2 or shape[0 if transposed else 1] != channels:
        return None
    found = [View(node.name, 1, (1, shape[0], shape[1], 1), 1 if transposed else 2)]
    if len(node.input) > 2 and node.input[2]:
        if _shape(graph, node.input[2]) not in ([channels], [1, channels]):
            return None
        found.append(_along(node, 2, channels))
    return found


def _along(node: onnx.NodeProto, position: int, channels: int, *, inverse: bool = False) -> View:
    """Return the view of a constant with one value for each channel."""
    return View(node.name, position, (1, channels, 1, 1), 1, inverse)


def _vector(graph: Graph, node: onnx.NodeProto, channels: int) -> int | None:
    """Return which of two inputs is a constant with one value for each channel.

    A constant for all channels is left alone: it may be part of a GELU, which engines compute in one node.
    """
    shapes = [_shape(graph, name) for name in node.input]
    fits = [k for k, shape in enumerate(shapes) if shape and shape[-1] == channels > 1 and np.prod(shape) == channels]
    return fits[0] if len(fits) == 1 and shapes[1 - fits[0]] is None else None


def _shape(graph: Graph, name: str) -> list[int] | None:
    """Return the shape of a constant."""
    tensor = graph.initializers.get(name)
    return None if tensor is None else list(tensor.dims)
