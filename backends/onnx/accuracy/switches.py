"""A quantized model in which an input of the graph says which of its quantizers round.

One session then measures what each of them costs in the outputs, alone or with others; to build a session for each
would take longer than to run it.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ...settings import WEIGHTED
from ..engines.quantizer_nodes import DEQUANTIZE, QUANTIZE
from ..feeds import Array
from ..model.graph import Graph, copied

SELECT = "klquant/select"


class SwitchedModel(NamedTuple):
    """A model with the additional input `SELECT`: for each quantizer whether it rounds."""

    model: onnx.ModelProto
    quantizers: list[str]
    """By number: an activation, or the node with a quantized weight, by its name in the float model."""

    def rounding(self, numbers: Iterable[int]) -> dict[str, Array]:
        """Return the input that lets these quantizers round, and no others."""
        chosen = np.zeros(len(self.quantizers), np.bool_)
        chosen[list(numbers)] = True
        return {SELECT: chosen}


def switched(graph: Graph, quantized: onnx.ModelProto) -> SwitchedModel:
    """Return a model with switches, from the graph of the float model and what ``quantize`` made of it.

    Tables of embeddings have none: they are always rounded. Constants of sums and products never are.
    """
    model = copied(quantized)
    layers = {name: (node.name, k) for node in model.graph.node for k, name in enumerate(node.input)}
    floats = {node.name: node for node in graph.nodes}
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    edits = _Edits({}, [], set(), [])
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type == QUANTIZE:
            edits.moved[node.output[0]] = node
        elif node.op_type == DEQUANTIZE and node.input[0] in edits.moved:
            quantizer = edits.moved[node.input[0]]
            nodes += edits.switch(_activation(quantizer, node, graph), quantizer.input[0], [quantizer, node])
        elif node.op_type == DEQUANTIZE and node.input[0] in types:
            layer, position = layers[node.output[0]]
            source = floats[layer].input[position]
            edits.floats.add(source)
            identity = helper.make_node("Identity", [source], [node.output[0]], f"{node.name}/float")
            is_weight = position == 1 and floats[layer].op_type in WEIGHTED
            nodes += edits.switch(layer, source, [node]) if is_weight else [identity]
        else:
            nodes.append(node)
    _write(model.graph, nodes, edits, graph)
    return SwitchedModel(model, edits.quantizers)


class _Edits(NamedTuple):
    """What was found and made so far."""

    moved: dict[str, onnx.NodeProto]
    """Quantizers, by their output."""
    quantizers: list[str]
    floats: set[str]
    """Constants of the float model that are read again."""
    constants: list[onnx.TensorProto]

    def switch(self, name: str, source: str, rounding: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
        """Return nodes that round the source if this quantizer is selected, and pass it on otherwise."""
        number, output = len(self.quantizers), rounding[-1].output[0]
        self.quantizers.append(name)
        prefix = f"{SELECT}/{number}"
        self.constants.append(numpy_helper.from_array(np.asarray(number, np.int64), prefix))
        identity = helper.make_node("Identity", [source], [f"{prefix}/float"], f"{prefix}/Identity")
        inner = [onnx.NodeProto.FromString(node.SerializeToString()) for node in rounding]
        inner[-1].output[0] = f"{prefix}/rounded"
        condition = helper.make_node("Gather", [SELECT, prefix], [f"{prefix}/selected"], f"{prefix}/Gather")
        branches = {"then_branch": _branch(inner), "else_branch": _branch([identity])}
        return [condition, helper.make_node("If", [f"{prefix}/selected"], [output], f"{prefix}/If", **branches)]


def _branch(nodes: list[onnx.NodeProto]) -> onnx.GraphProto:
    output = onnx.ValueInfoProto(name=nodes[-1].output[0])
    return helper.make_graph(nodes, nodes[-1].name, [], [output])


def _activation(quantizer: onnx.NodeProto, dequantizer: onnx.NodeProto, graph: Graph) -> str:
    """Return the tensor in the float model: a graph output gives its name to the dequantizer."""
    name: str = quantizer.input[0] if quantizer.input[0] in graph.types else dequantizer.output[0]
    return name


def _write(target: onnx.GraphProto, nodes: list[onnx.NodeProto], edits: _Edits, graph: Graph) -> None:
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del target.node[:]
    target.node.extend(copies)
    target.input.append(helper.make_tensor_value_info(SELECT, TensorProto.BOOL, [len(edits.quantizers)]))
    known = {tensor.name for tensor in target.initializer}
    target.initializer.extend(graph.initializers[name] for name in sorted(edits.floats - known))
    target.initializer.extend(edits.constants)
