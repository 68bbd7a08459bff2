"""Insert QuantizeLinear and DequantizeLinear into a model, as a plan says."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization.onnx_model import ONNXModel

from ...settings import WEIGHTED
from ...warning import warn
from ..model.graph import Graph, copied, to_array
from ..model.operators import attribute, channel_bias, has_constant_weight, output_channels
from .grids import Grid
from .plan import EVERYONE, Plan
from .weights import Quantized, least_scales, quantize_bias, quantize_operand, quantize_weight, representable

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
    biases: dict[str, str]
    """Biases of layers without one, by the name of the node."""

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
    model: onnx.ModelProto,
    graph: Graph,
    plan: Plan,
    grids: Mapping[str, Grid],
    *,
    int_bias: bool,
    reduce_range: bool,
    dead_channel: float = 0.0,
) -> onnx.ModelProto:
    """Return a model with Q/DQ at the planned activations and weights and, if `int_bias`, at biases."""
    result = copied(model)
    edits = Edits(graph, {*graph.types, *graph.producers, *(node.name for node in graph.nodes)}, [], {}, {}, {}, {}, {})
    for name, readers in plan.readers.items():
        _quantize_activation(edits, name, readers, grids[name])
    done: dict[tuple[object, ...], str] = {}
    coarse: dict[str, int] = {}
    for node in (node for node in graph.nodes if node.name in plan.weights):
        axis, scale = plan.weights[node.name], float(_written_scale(graph, node.input[0], grids[node.input[0]]))
        floor = 0.0 if axis is None else least_scales(graph, node, scale)
        weight = graph.initializers[node.input[1]]
        found = quantize_weight(weight, axis, reduce_range=reduce_range, dead_channel=dead_channel, floor=floor)
        if found.coarse:
            coarse[node.name] = found.coarse
        _write_weight(edits, node, found, axis, done)
        if int_bias:
            _quantize_bias(edits, node, scale, found.scale)
        if node.name in plan.biased:
            _add_bias(edits, node)
    for node in (node for node in graph.nodes if node.name in plan.tables):
        _quantize_table(edits, node, done)
    for node in (node for node in graph.nodes if node.name in plan.operands):
        _quantize_operand(edits, node)
    if int_bias:
        _keep_floats(edits, plan, grids)
    if coarse:
        channels = ", ".join(f"{number} of `{name}`" for name, number in coarse.items())
        warn(f"biases far above the products that they are added to make weights coarser, in channels: {channels}")
    _apply(edits, result.graph)
    ONNXModel(result).clean_initializers()
    return result


def _quantize_activation(edits: Edits, name: str, readers: set[str], grid: Grid) -> None:
    """Insert a quantizer and a dequantizer after a tensor."""
    steps = _written_scale(edits.graph, name, grid)
    constants = [edits.constant(f"{name}_scale", steps), edits.constant(f"{name}_zero_point", _written_zero(grid))]
    source, integers, result = name, edits.new_name(f"{name}_quantized"), edits.new_name(f"{name}_dequantized")
    if (
        EVERYONE in readers and name in edits.graph.outputs and name in edits.graph.producers
    ):  # the output keeps its name
        source, result = result, name
        edits.outputs[name] = source
    quantize = _node(edits, "QuantizeLinear", [source, *constants], integers)
    edits.after[name] = [quantize, _node(edits, "DequantizeLinear", [integers, *constants], result)]
    edits.inputs.update({(reader, name): result for reader in readers})


def _keep_floats(edits: Edits, plan: Plan, grids: Mapping[str, Grid]) -> None:
    """Give layers that stay in floating point inputs whose dequantizers have one scale per channel, all of them equal.

    Behind a dequantizer with a single scale, onnxruntime quantizes the weight of such a layer itself, per tensor, if
    its output is quantized (WeightBiasQuantization, since 1.19). Equal scales give the same values in the same time.
    """
    for node in (node for node in edits.graph.nodes if node.op_type in WEIGHTED and node.name not in plan.weights):
        name = node.input[0]
        shared = edits.inputs.get((node.name, name)) or edits.inputs.get((EVERYONE, name))
        if shared and has_constant_weight(edits.graph, node):
            axis, channels = _input_channels(edits.graph, node)
            constants = [
                edits.constant(f"{name}_scales", np.full(channels, _written_scale(edits.graph, name, grids[name]))),
                edits.constant(f"{name}_zero_points", np.full(channels, _written_zero(grids[name]))),
            ]
            result = edits.new_name(f"{name}_dequantized")
            inputs = [edits.after[name][0].output[0], *constants]
            edits.before[node.name] = [_node(edits, "DequantizeLinear", inputs, result, axis=axis)]
            edits.inputs[node.name, name] = result


def _input_channels(graph: Graph, node: onnx.NodeProto) -> tuple[int, int]:
    """Return the channel axis of a layer's input, and the number of channels."""
    dims, group = graph.initializers[node.input[1]].dims, attribute(node, "group", 1)
    if node.op_type == "Conv":
        return 1, dims[1] * group
    if node.op_type == "ConvTranspose":
        return 1, dims[0]
    if node.op_type == "MatMul":
        return -1, dims[-2 if len(dims) > 1 else 0]
    return (0 if attribute(node, "transA", 0) else 1), dims[1 if attribute(node, "transB", 0) else 0]


def _written_zero(grid: Grid) -> Array:
    return np.asarray(grid.zero_point, helper.tensor_dtype_to_np_dtype(grid.dtype))


def _written_scale(graph: Graph, name: str, grid: Grid) -> Array:
    """Return the scale of an activation in its own type."""
    return representable(grid.scale, helper.tensor_dtype_to_np_dtype(graph.types[name]))


def _write_weight(
    edits: Edits, node: onnx.NodeProto, found: Quantized, axis: int | None, done: dict[tuple[object, ...], str]
) -> None:
    """Replace a layer's weight by dequantized integers; layers with the same weight and scales share them."""
    name = node.input[1]
    key = name, axis, found.scale.tobytes()
    if key not in done:
        done[key] = _dequantized(edits, node, name, found, axis=axis)
    edits.inputs[node.name, name] = done[key]


def _quantize_bias(edits: Edits, node: onnx.NodeProto, input_scale: float, weight_scale: Array) -> None:
    """Replace a layer's bias by dequantized INT32, if it fits."""
    bias = channel_bias(edits.graph, node)
    if bias is None or bias.dtype != np.float32:  # the scales of float16 are too coarse for products
        return
    if (found := quantize_bias(bias, input_scale, weight_scale)) is not None:
        edits.inputs[node.name, node.input[2]] = _dequantized(edits, node, node.input[2], found, axis=0)


def _quantize_operand(edits: Edits, node: onnx.NodeProto) -> None:
    """Replace the constant in a sum or a product by dequantized UINT8 with one scale."""
    name = next(name for name in node.input if name in edits.graph.initializers)
    edits.inputs[node.name, name] = _dequantized(
        edits, node, name, quantize_operand(edits.graph.initializers[name]), axis=None
    )


def _quantize_table(edits: Edits, node: onnx.NodeProto, done: dict[tuple[object, ...], str]) -> None:
    """Gather integers, and dequantize them with one scale for each element of a vector."""
    name, output = node.input[0], node.output[0]
    found = quantize_weight(edits.graph.initializers[name], len(edits.graph.initializers[name].dims) - 1)
    scale = edits.constant(f"{output}_scale", found.scale)
    zero = edits.constant(f"{output}_zero_point", np.zeros(found.scale.shape, found.codes.dtype))
    if (key := (name, "table")) not in done:
        done[key] = edits.constant(f"{name}_quantized", found.codes)
    edits.inputs[node.name, name] = done[key]
    result, integers = edits.outputs.get(output, output), edits.new_name(f"{output}_gathered")
    edits.outputs[output] = integers
    edits.after.setdefault(output, []).insert(
        0, _node(edits, "DequantizeLinear", [integers, scale, zero], result, axis=-1)
    )


def _add_bias(edits: Edits, node: onnx.NodeProto) -> None:
    """Add a bias that changes nothing, but is not removed as zeros would be; a correction may have added one."""
    if len(node.input) > 2 and to_array(edits.graph.initializers[node.input[2]]).any():
        return
    weight = edits.graph.initializers[node.input[1]]
    dtype = helper.tensor_dtype_to_np_dtype(weight.data_type)
    least = np.full(
        output_channels(edits.graph, node), np.finfo(dtype).smallest_subnormal if dtype == np.float16 else 1e-30, dtype
    )
    edits.biases[node.name] = edits.constant(f"{node.name}_bias", least)


def _dequantized(edits: Edits, node: onnx.NodeProto, name: str, found: Quantized, *, axis: int | None) -> str:
    """Insert integers and their dequantizer before a node, and return the name of the result."""
    integers = edits.constant(f"{name}_quantized", found.codes)
    scale = edits.constant(f"{name}_scale", found.scale)
    zero = edits.constant(f"{name}_zero_point", np.full(found.scale.shape, found.zero_point, found.codes.dtype))
    result = edits.new_name(f"{name}_dequantized")
    attributes = {} if axis is None else {"axis": axis}
    dequantize = _node(edits, "DequantizeLinear", [integers, scale, zero], result, **attributes)
    edits.before.setdefault(node.name, []).append(dequantize)
    return result


def _node(edits: Edits, kind: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [output], edits.new_name(f"{output}/{kind}"), **attributes)


def _apply(edits: Edits, target: onnx.GraphProto) -> None:
    """Make the changes; new nodes go next to the nodes that need them, so the order stays topological."""
    nodes = [new for name in edits.graph.inputs for new in edits.after.get(name, [])]
    for node in target.node:
        for k, name in enumerate(node.input):
            addend = k == 2 and node.op_type in WEIGHTED and name not in edits.graph.initializers
            own = None if addend else edits.inputs.get((node.name, name))
            node.input[k] = own or edits.inputs.get((EVERYONE, name)) or name
        if node.name in edits.biases:
            node.input[2:] = [edits.biases[node.name]]
        following = [new for name in node.output for new in edits.after.get(name, [])]
        for k, name in enumerate(node.output):
            node.output[k] = edits.outputs.get(name, name)
        nodes += [*edits.before.get(node.name, []), node, *following]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del target.node[:]
    target.node.extend(copies)
    target.initializer.extend(edits.constants)
