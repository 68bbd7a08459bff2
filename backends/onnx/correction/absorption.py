"""Constants that can take up a factor for each channel of a tensor, so that scaling it costs no node."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import onnx

from ..feeds import Array
from ..model.graph import MAX_CHAIN, Graph, to_array
from ..model.normal_form import with_inner
from ..model.operators import attribute, has_constant_weight, sole_consumer

NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
"""Operators that multiply the normalized channels by their second input, and add the third."""
HOMOGENEOUS = ("Relu", "LeakyRelu", "Identity", "Dropout")
"""Operators f with f(s x) = s f(x) for s > 0."""


class Parameter(NamedTuple):
    """A constant that a node reads, with the channels on one of its axes."""

    node: str
    position: int
    axis: int = -1
    inverse: bool = False
    """Whether it divides."""


def keep_body_inputs(graph: Graph) -> Graph:
    """Return the graph with all that bodies of branches and loops read among its outputs: it must not be scaled."""
    bodies = (inner for node in graph.nodes for inner in with_inner(node) if inner is not node)
    return graph._replace(outputs=[*graph.outputs, *(name for inner in bodies for name in inner.input)])


def find_parameters(graph: Graph, name: str, channels: int) -> list[Parameter] | None:
    """Return the constants to be multiplied so that this tensor is; None if there are none.

    The channels are the last axis. The tensor itself may have any readers, but what is scaled on the way to it may not.
    """
    found: list[Parameter] = []
    for _ in range(MAX_CHAIN):
        node = graph.producers.get(name)
        if node is None or name != node.output[0]:
            return None
        if (ends := _ends(graph, node, channels)) is not None:
            return found + ends
        if node.op_type == "Add" and (position := _vector(graph, node, channels)) is not None:
            found.append(Parameter(node.name, position))
            name = node.input[1 - position]
        elif node.op_type in HOMOGENEOUS:
            name = node.input[0]
        else:
            return None
        if (only := sole_consumer(graph, name)) is None or only.name != node.name:
            return None
    return None


def _ends(graph: Graph, node: onnx.NodeProto, channels: int) -> list[Parameter] | None:
    """Return the constants of a node that scale its output, whatever comes in."""
    if node.op_type in NORMS:
        last = attribute(node, "axis", -1) == -1
        given = [position for position in (1, 2) if len(node.input) > position and node.input[position]]
        fits = last and given and all(_shape(graph, node.input[k]) == [channels] for k in given)
        return [Parameter(node.name, position) for position in given] if fits else None
    if node.op_type in ("Mul", "Div") and (position := _vector(graph, node, channels)) is not None:
        divides = node.op_type == "Div"
        return [Parameter(node.name, position, inverse=divides)] if position == 1 or not divides else None
    if node.op_type in ("MatMul", "Gemm") and has_constant_weight(graph, node):
        return _of_product(graph, node, channels)
    return None


def _of_product(graph: Graph, node: onnx.NodeProto, channels: int) -> list[Parameter] | None:
    axis = 0 if attribute(node, "transB", 0) else 1
    shape = _shape(graph, node.input[1]) or []
    found = [Parameter(node.name, 1, axis)]
    if len(node.input) > 2 and node.input[2]:
        if _shape(graph, node.input[2]) not in ([channels], [1, channels]):
            return None
        found.append(Parameter(node.name, 2))
    return found if len(shape) == 2 and shape[axis] == channels else None


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


def multiply(
    graph: Graph, values: dict[tuple[str, int], Array], parameters: Iterable[Parameter], factors: Array
) -> None:
    """Multiply the channels of constants by the factors; `values` holds all that were changed so far."""
    nodes = {node.name: node for node in graph.nodes}
    for one in parameters:
        key = one.node, one.position
        old = values[key] if key in values else to_array(graph.initializers[nodes[one.node].input[one.position]])
        shape = [1] * old.ndim
        shape[one.axis] = len(factors)
        wide = (1 / factors if one.inverse else factors).reshape(shape)
        values[key] = (old.astype(np.float64) * wide).astype(old.dtype)
