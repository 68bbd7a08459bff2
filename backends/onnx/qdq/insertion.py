"""Insert QuantizeLinear and DequantizeLinear into a model, as a plan says."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization.onnx_model import ONNXModel

from ..model.graph import Graph, copied
from .grids import Grid, Quantized, quantize_bias, quantize_weight
from .plan import EVERYONE, Plan

Array = np.ndarray[Any, Any]


class Edits(NamedTuple):
    """Changes to a graph, collected before they are made."""

    graph: Graph
    names: set[str]
    """Names in use, of tensors and nodes."""
    constants: list[onnx.TensorProto]
    before: dict[str, list[onnx.NodeProto]]
    """New nodes, by the name of the node that follows them."""
    after: dict[str, list[onnx.NodeProto]]
    """New nodes, by the name of the tensor that they follow."""
    inputs: dict[tuple[str, str], str]
    """New inputs, by the name of the node (or EVERYONE) and of the old input."""
    outputs: dict[str, str]
    """New names of outputs, by old name: a graph output gives its name to the dequantizer."""

    def constant(self, name: str, value: Array) -> str:
        """Add a constant with this name or a similar one, and return the name."""
        name = self.new_name(name)
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def new_name(self, wanted: str) -> str:
        """Return this name, with underscores appended while it is in use."""
        while wanted in self.names:
            wanted += "_"
        self.names.add(wanted)
        return wanted


def write_qdq(
    model: onnx.ModelProto, graph: Graph, plan: Plan, grids: Mapping[str, Grid], *, int_bias: bool, reduce_range: bool
) -> onnx.ModelProto:
    """Return a model with Q/DQ at the planned activations and weights and, if `int_bias`, at biases."""
    result = copied(model)
    edits = Edits(graph, {*graph.types, *graph.producers, *(node.name for node in graph.nodes)}, [], {}, {}, {}, {})
    for name, readers in plan.readers.items():
        _quantize_activation(edits, name, readers, grids[name])
    weights: dict[tuple[str, int], tuple[str, Array]] = {}
    for node in (node for node in graph.nodes if node.name in plan.weights):
        scale = _quantize_weight(edits, node, plan.weights[node.name], weights, reduce_range=reduce_range)
        if int_bias:
            _quantize_bias(edits, node, grids[node.input[0]].scale, scale)
    _apply(edits, result.graph)
    ONNXModel(result).clean_initializers()
    return result


def _quantize_activation(edits: Edits, name: str, readers: set[str], grid: Grid) -> None:
    """Insert a quantizer and a dequantizer after a tensor."""
    steps = np.asarray(grid.scale, helper.tensor_dtype_to_np_dtype(edits.graph.types[name]))
    zero = np.asarray(grid.zero_point, helper.tensor_dtype_to_np_dtype(grid.dtype))
    constants = [edits.constant(f"{name}_scale", steps), edits.constant(f"{name}_zero_point", zero)]
    source, integers, result = name, edits.new_name(f"{name}_quantized"), edits.new_name(f"{name}_dequantized")
    if EVERYONE in readers and name in edits.graph.outputs:  # the output keeps its name
        source, result = result, name
        edits.outputs[name] = source
    quantize = _node(edits, "QuantizeLinear", [source, *constants], integers)
    edits.after[name] = [quantize, _node(edits, "DequantizeLinear", [integers, *constants], result)]
    edits.inputs.update({(reader, name): result for reader in readers})


def _quantize_weight(
    edits: Edits, node: onnx.NodeProto, axis: int, done: dict[tuple[str, int], tuple[str, Array]], *, reduce_range: bool
) -> Array:
    """Replace a layer's weight by dequantized integers and return their scales; a shared weight is quantized once."""
    name = node.input[1]
    if (name, axis) not in done:
        found = quantize_weight(edits.graph.initializers[name], axis, reduce_range=reduce_range)
        done[name, axis] = _dequantized(edits, node, name, found, axis=axis), found.scale
    edits.inputs[node.name, name], scale = done[name, axis]
    return scale


def _quantize_bias(edits: Edits, node: onnx.NodeProto, input_scale: float, weight_scale: Array) -> None:
    """Replace a layer's bias by dequantized INT32, if it fits."""
    bias = edits.graph.initializers.get(node.input[2]) if len(node.input) > 2 else None
    found = None if bias is None else quantize_bias(bias, input_scale, weight_scale)
    if found is not None:
        edits.inputs[node.name, node.input[2]] = _dequantized(edits, node, node.input[2], found, axis=0)


def _dequantized(edits: Edits, node: onnx.NodeProto, name: str, found: Quantized, *, axis: int) -> str:
    """Insert integers and their dequantizer before a node, and return the name of the result."""
    integers = edits.constant(f"{name}_quantized", found.codes)
    scale = edits.constant(f"{name}_scale", found.scale)
    zero = edits.constant(f"{name}_zero_point", np.zeros(found.scale.shape, found.codes.dtype))
    result = edits.new_name(f"{name}_dequantized")
    dequantize = _node(edits, "DequantizeLinear", [integers, scale, zero], result, axis=axis)
    edits.before.setdefault(node.name, []).append(dequantize)
    return result


def _node(edits: Edits, kind: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [output], edits.new_name(f"{output}/{kind}"), **attributes)


def _apply(edits: Edits, target: onnx.GraphProto) -> None:
    """Make the changes; new nodes go next to the nodes that need them, so the order stays topological."""
    nodes = [new for name in edits.graph.inputs for new in edits.after.get(name, [])]
    for node in target.node:
        for k, name in enumerate(node.input):
            node.input[k] = edits.inputs.get((node.name, name)) or edits.inputs.get((EVERYONE, name)) or name
        following = [new for name in node.output for new in edits.after.get(name, [])]
        for k, name in enumerate(node.output):
            node.output[k] = edits.outputs.get(name, name)
        nodes += [*edits.before.get(node.name, []), node, *following]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del target.node[:]
    target.node.extend(copies)
    target.initializer.extend(edits.constants)
