"""Write QuantizeLinear and DequantizeLinear into a model, as planned."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization.onnx_model import ONNXModel

from ..model.graph import Graph, copied
from ..model.operators import channel_bias
from .grids import Grid
from .plan import EVERYONE, Plan
from .weights import Quantized, least_scales, quantize_bias, quantize_weight, representable

Array = np.ndarray[Any, Any]


class Edits(NamedTuple):
    """What is to change in a graph."""

    graph: Graph
    names: set[str]
    """All that are taken."""
    constants: list[onnx.TensorProto]
    before: dict[str, list[onnx.NodeProto]]
    """New nodes, by the name of the node that they precede."""
    after: dict[str, list[onnx.NodeProto]]
    """New nodes, by the tensor that they follow."""
    reads: dict[tuple[str, str], str]
    """What a node reads instead of a tensor, by names of node (or EVERYONE) and tensor."""
    gives: dict[str, str]
    """How a tensor is called that leaves its producer, where its name is needed behind the dequantizer."""

    def constant(self, name: str, value: Array) -> str:
        """Add a constant, under this name or one like it."""
        name = self.new_name(name)
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def new_name(self, wanted: str) -> str:
        """Return a name that is not taken, and take it."""
        while wanted in self.names:
            wanted += "_"
        self.names.add(wanted)
        return wanted


def write_qdq(
    model: onnx.ModelProto,
    graph: Graph,
    plan: Plan,
    grids: Mapping[str, Grid],
    *,
    int_bias: bool,
    reduce_range: bool,
    dead_channel: float = 0.0,
) -> onnx.ModelProto:
    """Return the model with the planned activations, weights and (if `int_bias`) biases as integers and back."""
    result = copied(model)
    edits = Edits(graph, {*graph.types, *graph.producers, *(node.name for node in graph.nodes)}, [], {}, {}, {}, {})
    for name, readers in plan.readers.items():
        _quantize_activation(edits, name, readers, grids[name])
    done: dict[tuple[object, ...], str] = {}
    for node in (node for node in graph.nodes if node.name in plan.weights):
        axis, scale = plan.weights[node.name], float(_written_scale(graph, node.input[0], grids[node.input[0]]))
        floor, weight = least_scales(graph, node, scale), graph.initializers[node.input[1]]
        found = quantize_weight(weight, axis, reduce_range=reduce_range, dead_channel=dead_channel, floor=floor)
        _write_weight(edits, node, found, axis, done)
        if int_bias:
            _quantize_bias(edits, node, scale, found.scale)
    _apply(edits, result.graph)
    ONNXModel(result).clean_initializers()
    return result


def _quantize_activation(edits: Edits, name: str, readers: set[str], grid: Grid) -> None:
    """Let a quantizer and a dequantizer follow a tensor."""
    steps = _written_scale(edits.graph, name, grid)
    zero = np.asarray(grid.zero_point, helper.tensor_dtype_to_np_dtype(grid.dtype))
    constants = [edits.constant(f"{name}_scale", steps), edits.constant(f"{name}_zero_point", zero)]
    source, integers, result = name, edits.new_name(f"{name}_quantized"), edits.new_name(f"{name}_dequantized")
    if EVERYONE in readers and name in edits.graph.outputs and name in edits.graph.producers:  # its name must stay
        source, result = result, name
        edits.gives[name] = source
    quantize = _node(edits, "QuantizeLinear", [source, *constants], integers)
    edits.after[name] = [quantize, _node(edits, "DequantizeLinear", [integers, *constants], result)]
    edits.reads.update({(reader, name): result for reader in readers})


def _written_scale(graph: Graph, name: str, grid: Grid) -> Array:
    """Return the scale of an activation in its own type."""
    return representable(grid.scale, helper.tensor_dtype_to_np_dtype(graph.types[name]))


def _write_weight(
    edits: Edits, node: onnx.NodeProto, found: Quantized, axis: int | None, done: dict[tuple[object, ...], str]
) -> None:
    """Let a layer read its weight from integers. Layers with the same weight and scales share them."""
    name = node.input[1]
    key = name, axis, found.scale.tobytes()
    if key not in done:
        done[key] = _dequantized(edits, node, name, found, axis=axis)
    edits.reads[node.name, name] = done[key]


def _quantize_bias(edits: Edits, node: onnx.NodeProto, input_scale: float, weight_scale: Array) -> None:
    """Let a layer read its bias from INT32, where that holds it."""
    bias = channel_bias(edits.graph, node)
    if bias is None or bias.dtype != np.float32:  # the scales of float16 are too coarse for products
        return
    if (found := quantize_bias(bias, input_scale, weight_scale)) is not None:
        edits.reads[node.name, node.input[2]] = _dequantized(edits, node, node.input[2], found, axis=0)


def _dequantized(edits: Edits, node: onnx.NodeProto, name: str, found: Quantized, *, axis: int | None) -> str:
    """Put integers, and their dequantizer, before a node; return what it gives."""
    integers = edits.constant(f"{name}_quantized", found.codes)
    scale = edits.constant(f"{name}_scale", found.scale)
    zero = edits.constant(f"{name}_zero_point", np.zeros(found.scale.shape, found.codes.dtype))
    result = edits.new_name(f"{name}_dequantized")
    attributes = {} if axis is None else {"axis": axis}
    dequantize = _node(edits, "DequantizeLinear", [integers, scale, zero], result, **attributes)
    edits.before.setdefault(node.name, []).append(dequantize)
    return result


def _node(edits: Edits, kind: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [output], edits.new_name(f"{output}/{kind}"), **attributes)


def _apply(edits: Edits, target: onnx.GraphProto) -> None:
    """Make the changes; new nodes stand where they are needed, so the order stays topological."""
    nodes = [new for name in edits.graph.inputs for new in edits.after.get(name, [])]
    for node in target.node:
        for k, name in enumerate(node.input):
            node.input[k] = edits.reads.get((node.name, name)) or edits.reads.get((EVERYONE, name)) or name
        following = [new for name in node.output for new in edits.after.get(name, [])]
        for k, name in enumerate(node.output):
            node.output[k] = edits.gives.get(name, name)
        nodes += [*edits.before.get(node.name, []), node, *following]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del target.node[:]
    target.node.extend(copies)
    target.initializer.extend(edits.constants)
