"""Remove the marks of a traced model, and collect which tensors they round, by which scale and for which nodes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import onnx
import onnx_ir as ir

from klquant.errors import InvalidInputError

from ...onnx.model.normal_form import sort_values
from ...onnx.model.operators import RECTIFIERS
from ...onnx.qdq.plan import EVERYONE
from ...settings import WEIGHTED
from .trace import DOMAIN, ROUNDED, Traced

BEFORE_LAYERS = ("Pad", "Unsqueeze")  # torch inserts these between the input and the operator of a layer


class Roundings(NamedTuple):
    """Where a simulated model rounds, in the graph without marks."""

    thresholds: dict[str, float]
    """T by tensor name."""
    readers: dict[str, set[str]]
    """Names of the nodes that read a rounded tensor; EVERYONE means all and the graph output."""
    layers: dict[str, str]
    """Names of the simulated layers, by node name."""
    conflicts: list[tuple[str, str, str]]
    """A tensor, and two layers that round it by different scales."""
    reached: set[str]
    """Names of the simulated layers and operands that the graph has."""


class Mark(NamedTuple):
    """A place where a layer rounds."""

    node: ir.Node
    source: ir.Value
    result: ir.Value
    layer: str
    threshold: float
    observe: str


def remove_marks(traced: Traced) -> tuple[onnx.ModelProto, Roundings]:
    """Turn a traced model, which is used up, into a float model with the names of the user's model.

    A mark becomes an Identity where it cannot go: if another layer rounds the tensor by another scale, if the tensor is
    a constant, or if both the tensor and its rounded values are outputs of the graph. An output named after a mark gets
    the name of the marked tensor, unless the user named the outputs.
    """
    _rename_initializers(traced.model.graph, traced.initializers)
    del traced.model.opset_imports[DOMAIN]
    finder = _Finder(traced)
    for node in [node for node in ir.traversal.RecursiveGraphIterator(traced.model.graph) if node.domain == DOMAIN]:
        if node.op_type == ROUNDED:
            finder.add(_read_mark(node))
        else:
            finder.remove(node)
    _drop_metadata(traced.model.graph)
    model = ir.to_proto(traced.model)
    sort_values(model.graph)  # drops the types of constants
    return model, finder.roundings


class _Finder:
    """Removes marks from a graph, in their order, and collects the roundings."""

    def __init__(self, traced: Traced) -> None:
        self.roundings = Roundings({}, {}, {}, [], set())
        self._graph, self._named_outputs = traced.model.graph, traced.named_outputs
        self._first: dict[str, str] = {}  # the layer that rounds a tensor first

    def remove(self, node: ir.Node) -> None:
        """Remove a node that returns its input."""
        source: Any = node.inputs[0]
        graph: Any = node.graph
        result = node.outputs[0]
        if result.is_graph_output() and self._named_outputs:
            source.name, result.name = result.name, source.name
        result.replace_all_uses_with(source, replace_graph_outputs=True)
        graph.remove(node, safe=True)

    def add(self, mark: Mark) -> None:
        """Remove a mark and add its rounding."""
        self.roundings.reached.add(mark.layer)
        self._remove_repeated(mark)
        if any(node.graph is not self._graph for node in mark.result.consumers()):
            raise InvalidInputError(
                f"layer `{mark.layer}` must not round what a branch of the model (torch.cond) reads; exclude the layer"
            )
        readers, is_output, tensor = mark.result.consumers(), mark.result.is_graph_output(), mark.result
        if mark.observe == "outputs":
            self._note_layer(_operator(mark.source), mark)
        if self._can_go(mark):
            self.remove(mark.node)
            tensor = mark.source
        else:
            _make_identity(mark.node)
        if is_output:
            self._note(mark, tensor, EVERYONE)
        for value, node in _edges(mark, tensor, readers):
            self._note(mark, value, str(node.name))
            if mark.observe == "inputs":
                self._note_layer(node, mark)

    def _can_go(self, mark: Mark) -> bool:
        """Return whether the tensor can be rounded under its own name."""
        source, name = mark.source, str(mark.source.name)
        if self.roundings.thresholds.get(name, mark.threshold) != mark.threshold:
            self.roundings.conflicts.append((name, self._first[name], mark.layer))
            return False
        alone = len(source.uses()) == 1 and not source.is_graph_output() and not source.is_graph_input()
        return not source.is_initializer() and (alone or not mark.result.is_graph_output())

    def _remove_repeated(self, mark: Mark) -> None:
        """Remove rectifiers after a layer that rectifies: folding copied them into the layer and left them in place."""
        for node in mark.result.consumers() if _highest(mark.source.producer()) is not None else ():
            highest = _highest(node)
            if highest is not None and highest >= mark.threshold and not node.outputs[0].is_graph_output():
                self.remove(node)

    def _note(self, mark: Mark, tensor: ir.Value, reader: str) -> None:
        name = str(tensor.name)
        self._first.setdefault(name, mark.layer)
        self.roundings.thresholds[name] = mark.threshold
        self.roundings.readers.setdefault(name, set()).add(reader)

    def _note_layer(self, node: ir.Node | None, mark: Mark) -> None:
        if node is not None and node.op_type in WEIGHTED:
            self.roundings.layers[str(node.name)] = mark.layer


def _highest(node: ir.Node | None) -> float | None:
    """Return the largest value that a rectifier passes on, with a margin for float32; None for any other node."""
    if node is None or node.op_type not in RECTIFIERS:
        return None
    bounds = [_scalar(value) for value in node.inputs[1:3]]
    low, high = (*bounds, *(0.0 if node.op_type == "Relu" else -math.inf, math.inf)[len(bounds) :])
    return high * (1 + 1e-6) if low == 0 else None


def _scalar(value: ir.Value | None) -> float:
    return math.nan if value is None or value.const_value is None else float(value.const_value.numpy())


def _edges(mark: Mark, tensor: ir.Value, readers: Sequence[ir.Node]) -> Iterator[tuple[ir.Value, ir.Node]]:
    """Yield the readers, each with the tensor to round: next to the layer, if its operator does not come first."""
    for reader in readers:
        if mark.observe == "inputs" and reader.op_type in BEFORE_LAYERS:
            yield from _edges(mark, reader.outputs[0], reader.outputs[0].consumers())
        else:
            yield tensor, reader


def _operator(value: ir.Value) -> ir.Node | None:
    """Return the operator of the layer that computes a tensor, perhaps before its bias and its ReLU."""
    node = value.producer()
    while node is not None and node.op_type not in WEIGHTED:
        inputs = (one for one in node.inputs if one is not None and not one.is_initializer())
        floats = (one.producer() for one in inputs if one.dtype is not None and one.dtype.is_floating_point())
        node = next(floats, None)
    return node


def _make_identity(node: ir.Node) -> None:
    node.domain, node.op_type = "", "Identity"
    node.attributes.clear()


def _read_mark(node: ir.Node) -> Mark:
    source: Any = node.inputs[0]
    given = node.attributes
    threshold = 127 * given["scale"].as_float()
    return Mark(node, source, node.outputs[0], given["layer"].as_string(), threshold, given["observe"].as_string())


def _rename_initializers(graph: ir.Graph, names: Mapping[str, str]) -> None:
    """Give initializers these names, where they are free."""
    taken = {value.name for value in (*graph.inputs, *(output for node in graph for output in node.outputs))}
    values = list(graph.initializers.values())
    graph.initializers.clear()  # renaming in place would move a constant to the end
    for value in values:
        name = names.get(str(value.name), value.name)
        if name not in taken:
            value.name = name
        graph.initializers.add(value)


def _drop_metadata(graph: ir.Graph) -> None:
    """Drop what the exporter says about files and lines."""
    for node in ir.traversal.RecursiveGraphIterator(graph):
        for one in (node, *node.inputs, *node.outputs):
            if one is not None:
                one.metadata_props.clear()
