"""What the marks in a traced model say: which tensors are rounded, by which scale, on the way to whom."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import onnx
from onnx import helper, numpy_helper

from ...onnx.model.graph import read_graph
from ...onnx.model.normal_form import all_nodes, sort_values
from ...onnx.model.operators import activations, is_rectifier
from ...onnx.qdq.plan import EVERYONE
from ...settings import WEIGHTED
from .trace import DOMAIN, ROUNDED, Traced

BEFORE_LAYERS = ("Pad", "Unsqueeze")  # what torch puts between a layer's input and its operator; they move values


class Roundings(NamedTuple):
    """Where a simulated model rounds, in the graph without marks."""

    thresholds: dict[str, float]
    """T by tensor."""
    readers: dict[str, set[str]]
    """Names of the nodes that read a tensor rounded; EVERYONE for all and the graph's output."""
    layers: dict[str, str]
    """Names of the simulated layers, by name of the node that computes one."""
    conflicts: list[tuple[str, str, str]]
    """A tensor, and the layers that round it by different scales."""


class Mark(NamedTuple):
    """Where a layer rounds."""

    node: onnx.NodeProto
    layer: str
    threshold: float
    observe: str


def remove_marks(traced: Traced) -> Roundings:
    """Make a traced model one in floating point, in place, with the names of the user's.

    A mark becomes an Identity where it cannot just go: if another layer rounds the tensor by another scale, if the
    tensor is a constant, or both the tensor and what it is rounded to are outputs of the graph. Outputs that are called
    after a mark are called after what it marks instead, unless a person named them.
    """
    graph = traced.model.graph
    _tidy(traced.model, traced.initializers)
    found = _Finder(traced)
    for node in [node for node in graph.node if node.domain == DOMAIN]:
        if node.op_type == ROUNDED:
            found.add(_read_mark(node))
        else:
            found.remove(node)
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in found.kept()]
    del graph.node[:]
    graph.node.extend(kept)
    sort_values(graph)
    outputs = {value.name for value in graph.output}
    for value in [value for value in graph.value_info if value.name in outputs]:
        graph.value_info.remove(value)
    return found.roundings


class _Finder:
    """Takes marks out of a graph, one by one in their order."""

    def __init__(self, traced: Traced) -> None:
        self.graph = read_graph(traced.model)
        self._outputs, self._named = traced.model.graph.output, traced.named_outputs
        self.roundings = Roundings({}, {}, {}, [])
        self._consumers = {name: list(nodes) for name, nodes in self.graph.consumers.items()}
        self._first: dict[str, str] = {}  # the layer that rounds a tensor
        self._removed: set[str] = set()

    def kept(self) -> list[onnx.NodeProto]:
        """Return the nodes that are left."""
        return [node for node in self.graph.nodes if node.name not in self._removed]

    def remove(self, node: onnx.NodeProto) -> str:
        """Take out a node that passes a tensor on; return the one name that is left for both."""
        source, result = str(node.input[0]), str(node.output[0])
        if result in self.graph.outputs and not self._rename_output(source, result):
            old, new = source, result
            self.graph.producers[new] = self.graph.producers[old]
            _rename(self.graph.producers[old].output, old, new)
        else:
            old, new = result, source
        readers = [reader for reader in self._consumers.get(source, []) if reader is not node]
        for reader in readers if old == source else self._consumers.get(result, []):
            _rename(reader.input, old, new)
        self._consumers[new] = readers + self._consumers.get(result, [])
        self._removed.add(node.name)
        return new

    def _rename_output(self, source: str, result: str) -> bool:
        """Give an output of the graph the name of another tensor, if none of them was chosen by a person."""
        if self._named or source in (*self.graph.outputs, *self.graph.inputs):
            return False
        place = self.graph.outputs.index(result)
        self.graph.outputs[place] = self._outputs[place].name = source
        return True

    def add(self, mark: Mark) -> None:
        """Take out a mark and note what it says."""
        source, result = mark.node.input[0], mark.node.output[0]
        self._remove_repeated(mark)
        readers, is_output = self._consumers.get(result, []), result in self.graph.outputs
        if mark.observe == "outputs":
            self._note_layer(self._operator(source), mark)
        tensor = self.remove(mark.node) if self._can_go(mark, source, is_output) else _keep(mark.node)
        if is_output:
            self._note(mark, tensor, EVERYONE)
        for name, node in self._edges(mark, tensor, readers):
            self._note(mark, name, node.name)
            if mark.observe == "inputs":
                self._note_layer(node, mark)

    def _can_go(self, mark: Mark, source: str, is_output: bool) -> bool:
        """Return whether the tensor can be rounded under its own name."""
        if self.roundings.thresholds.get(source, mark.threshold) != mark.threshold:
            self.roundings.conflicts.append((source, self._first[source], mark.layer))
            return False
        alone = len(self._consumers[source]) == 1 and source not in (*self.graph.outputs, *self.graph.inputs)
        return source not in self.graph.initializers and (alone or not is_output)

    def _remove_repeated(self, mark: Mark) -> None:
        """Take out rectifiers behind a layer that rectifies: they are its own, left in place when they were folded."""
        before = self.graph.producers.get(mark.node.input[0])
        for node in list(self._consumers.get(mark.node.output[0], [])):
            repeats = before is not None and is_rectifier(self.graph, before) and is_rectifier(self.graph, node)
            if repeats and self._highest(node) >= mark.threshold and node.output[0] not in self.graph.outputs:
                self.remove(node)

    def _highest(self, rectifier: onnx.NodeProto) -> float:
        """Return where a rectifier cuts off, but for a rounding of float32."""
        if len(rectifier.input) < 3:
            return math.inf
        bound = self.graph.initializers.get(rectifier.input[2])
        return -math.inf if bound is None else float(numpy_helper.to_array(bound)) * (1 + 1e-6)

    def _edges(self, mark: Mark, tensor: str, readers: list[onnx.NodeProto]) -> Iterator[tuple[str, onnx.NodeProto]]:
        """Yield which tensor is to be rounded for whom: next to the layer, where its operator does not come first."""
        for reader in readers:
            if mark.observe == "inputs" and reader.op_type in BEFORE_LAYERS:
                moved = reader.output[0]
                yield from self._edges(mark, moved, self._consumers.get(moved, []))
            else:
                yield tensor, reader

    def _operator(self, name: str) -> onnx.NodeProto | None:
        """Return the layer's operator that a tensor comes from, by way of its bias and its ReLU."""
        while (node := self.graph.producers.get(name)) is not None and node.op_type not in WEIGHTED:
            name = next(iter(activations(self.graph, node)), "")
        return node

    def _note(self, mark: Mark, tensor: str, reader: str) -> None:
        self._first.setdefault(tensor, mark.layer)
        self.roundings.thresholds[tensor] = mark.threshold
        self.roundings.readers.setdefault(tensor, set()).add(reader)

    def _note_layer(self, node: onnx.NodeProto | None, mark: Mark) -> None:
        if node is not None and node.op_type in WEIGHTED:
            self.roundings.layers[node.name] = mark.layer


def _rename(names: Any, old: str, new: str) -> None:
    names[:] = [new if name == old else name for name in names]


def _keep(node: onnx.NodeProto) -> str:
    """Make a mark an Identity; return what it gives."""
    node.CopyFrom(helper.make_node("Identity", node.input, node.output, name=node.name))
    return str(node.output[0])


def _read_mark(node: onnx.NodeProto) -> Mark:
    said = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    return Mark(node, said["layer"].decode(), 127 * float(said["scale"]), said["observe"].decode())


def _tidy(model: onnx.ModelProto, names: Mapping[str, str]) -> None:
    """Rename initializers, where a name is free; take out what the exporter tells of files and lines."""
    graph = model.graph
    taken = {*(value.name for value in graph.input), *(name for node in graph.node for name in node.output)}
    renamed = {name: plain for name, plain in names.items() if plain not in taken}
    for node in all_nodes(graph):
        node.input[:] = [renamed.get(name, name) for name in node.input]
        del node.metadata_props[:]
    for tensor in graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    for value in (*graph.initializer, *graph.value_info, *graph.input, *graph.output):
        del value.metadata_props[:]
    for entry in [entry for entry in model.opset_import if entry.domain == DOMAIN]:
        model.opset_import.remove(entry)
