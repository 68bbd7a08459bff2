"""Tensors whose channels can be shifted: a constant before adds the shift, and those behind take it away again.

That costs no node, and the model computes the same up to rounding.
"""

from collections.abc import Mapping
from typing import NamedTuple, cast

import numpy as np
import onnx

from ...rounding import Array
from ..model.graph import Graph, to_array
from ..model.normal_form import keep_body_inputs
from ..model.operators import (
    attribute,
    constant_of_channels,
    has_constant_weight,
    is_padded,
    output_channels,
    sole_consumer,
    weight_axis,
)
from ..qdq.plan import Plan
from .biases import find_bias
from .patches import as_rows

LAYERS = ("Conv", "Gemm", "MatMul")


class Term(NamedTuple):
    """A constant that is added to channels, and how a shift changes it."""

    node: str
    position: int
    """Of the constant among the inputs of the node."""
    values: Array
    """Shape (outputs, 1, ...), with as many axes of size 1 as follow the channels."""
    weights: Array
    """Shape (groups, outputs, inputs): what the shift of the channels is multiplied by."""

    def change(self, shift: Array) -> Array:
        """Return what a shift of all channels adds, in the shape of the constant."""
        groups, _, inputs = self.weights.shape
        found: Array = np.einsum("goi,gi->go", self.weights, shift.reshape(groups, inputs))
        return found.reshape(self.values.shape)


class Shift(NamedTuple):
    """A tensor whose channels can be shifted."""

    axis: int
    """Of the channels, counted from the last one."""
    added: Term
    taken: list[Term]


def find_shifts(graph: Graph, plan: Plan) -> dict[str, Shift]:
    """Return the quantized tensors whose channels can be shifted, by name.

    Those in half precision are left alone: their constants are coarser than the shifts.
    """
    finder = _Finder(keep_body_inputs(graph), plan)
    floats = [name for name in plan.readers if graph.types.get(name) == onnx.TensorProto.FLOAT]
    found = {name: finder.shift(name) for name in floats if name not in finder.graph.outputs}
    return {name: shift for name, shift in found.items() if shift is not None}


def moved(shifts: Mapping[str, Shift], by: Mapping[str, Array]) -> dict[tuple[str, int], Array]:
    """Return the constants of a model in which these tensors are shifted, as :func:`with_parameters` takes them."""
    values, changes = dict[tuple[str, int], Array](), dict[tuple[str, int], Array]()
    for name, shift in by.items():
        for sign, term in ((1, shifts[name].added), *((-1, term) for term in shifts[name].taken)):
            key = term.node, term.position
            values[key], changes[key] = term.values, changes.get(key, 0.0) + sign * term.change(shift)
    return {key: (value.astype(np.float64) + changes[key]).astype(value.dtype) for key, value in values.items()}


class _Finder(NamedTuple):
    """A graph, and what of it is quantized."""

    graph: Graph
    plan: Plan

    def shift(self, name: str) -> Shift | None:
        """Return how the channels of a tensor can be shifted; None if something before or behind it cannot follow."""
        shape = self._shape(name)
        added = shape and self._added(name, shape)
        if not shape or not added:
            return None
        taken = [self._taken(node, name, shape) for node in self.graph.consumers.get(name, [])]
        every = [term for term in taken if term is not None]
        return Shift(-len(shape), added, every) if every and len(every) == len(taken) else None

    def _shape(self, name: str) -> tuple[int, ...]:
        """Return (channels, 1, ...) as the layer that computes the tensor says, or one that reads it."""
        graph, before = self.graph, self.graph.producers.get(name)
        if before is not None and before.op_type in ("Conv", "ConvTranspose") and has_constant_weight(graph, before):
            return output_channels(graph, before), *[1] * (len(graph.initializers[before.input[1]].dims) - 2)
        for node in graph.consumers.get(name, []):
            if node.op_type in LAYERS and node.input[0] == name and has_constant_weight(graph, node):
                dims, groups = graph.initializers[node.input[1]].dims, cast(int, attribute(node, "group", 1))
                inputs = dims[1] if weight_axis(graph, node) == 0 else dims[0]
                return inputs * groups, *[1] * (len(dims) - 2)
        return ()

    def _weights(self, node: onnx.NodeProto, name: str) -> Array | None:
        """Return what a layer multiplies the channels of its input by, the same at all positions."""
        graph = self.graph
        if node.op_type not in LAYERS or list(node.input).index(name) != 0:
            return None
        if not has_constant_weight(graph, node) or len(graph.initializers[node.input[1]].dims) < 2:
            return None
        matrix = len(graph.initializers[node.input[1]].dims) == 2 and not attribute(node, "transA", 0)
        if is_padded(node) if node.op_type == "Conv" else not matrix:
            return None
        rows, kernel = as_rows(graph, node), int(np.prod(graph.initializers[node.input[1]].dims[2:]))
        groups, outputs, inputs = rows.values.shape
        found = rows.values.reshape(groups, outputs, inputs // kernel, kernel).sum(axis=3)
        scale = cast(float, attribute(node, "alpha", 1.0)) if node.op_type == "Gemm" else 1.0
        return np.asarray(found * scale, np.float32)

    def _added(self, name: str, shape: tuple[int, ...]) -> Term | None:
        """Return the constant that is added to a tensor at last, by a layer or in floating point."""
        node, one = self.graph.producers.get(name), np.ones((shape[0], 1, 1))
        if node is None or name != node.output[0]:
            return None
        if node.op_type in ("Conv", "ConvTranspose", "Gemm"):
            return self._bias(node, shape, one)
        if node.op_type == "LayerNormalization" and len(shape) == 1 and attribute(node, "axis", -1) == -1:
            return self._term(node, 2, shape, one)
        return self._sum(node, shape, one)

    def _taken(self, node: onnx.NodeProto, name: str, shape: tuple[int, ...]) -> Term | None:
        """Return the constant that can take the shift away behind a node that reads the tensor."""
        if (weights := self._weights(node, name)) is not None:
            outputs = weights.shape[0] * weights.shape[1]
            return self._bias(node, (outputs, *shape[1:]), weights)
        if node.op_type != "Mul":
            return self._sum(node, shape, np.ones((shape[0], 1, 1)))
        position = 1 - list(node.input).index(name)
        factor = self._constant(node, position, shape)
        after = sole_consumer(self.graph, node.output[0])
        if factor is None or after is None or node.name in self.plan.operands or node.output[0] in self.plan.readers:
            return None
        return self._sum(after, shape, factor.astype(np.float64).reshape(shape[0], 1, 1))

    def _bias(self, layer: onnx.NodeProto, shape: tuple[int, ...], weights: Array) -> Term | None:
        bias = find_bias(self.graph, layer)
        if bias is None or (len(bias.values), bias.spatial) != (shape[0], len(shape) - 1):
            return None
        return None if bias.node in self.plan.operands else Term(bias.node, bias.position, bias.values, weights)

    def _sum(self, node: onnx.NodeProto, shape: tuple[int, ...], weights: Array) -> Term | None:
        """Return the constant of an Add in floating point."""
        if node.op_type != "Add" or node.name in self.plan.operands:
            return None
        positions = [k for k, name in enumerate(node.input) if name in self.graph.initializers]
        return self._term(node, positions[0], shape, weights) if len(positions) == 1 else None

    def _term(self, node: onnx.NodeProto, position: int, shape: tuple[int, ...], weights: Array) -> Term | None:
        values = self._constant(node, position, shape)
        return None if values is None else Term(node.name, position, values, weights)

    def _constant(self, node: onnx.NodeProto, position: int, shape: tuple[int, ...]) -> Array | None:
        """Return a constant input with one value for all channels, or one for each."""
        tensor = constant_of_channels(self.graph, node, position, shape)
        if tensor is None:
            return None
        return np.broadcast_to(to_array(tensor).reshape(-1, *[1] * (len(shape) - 1)), shape)
