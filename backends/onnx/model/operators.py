"""Properties of ONNX operators: which are quantized, and where their weights are."""

from typing import Any

import numpy as np
import onnx

from ...settings import WEIGHTED
from .graph import MAX_CHAIN, Graph, to_array

RECTIFIERS = ("Relu", "Clip")
"""Operators that engines fuse with the layer before."""
MOVING = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze")
"""Operators that only move or select values: quantizing their input quantizes their output."""
AVERAGING = ("AveragePool", "GlobalAveragePool", "ReduceMean")
COMBINING = ("Add", "Mul", "Concat")
CURVES = ("Sigmoid", "LeakyRelu")


def activations(graph: Graph, node: onnx.NodeProto) -> list[str]:
    """Return the activations among the inputs of a node, without the addend of a Gemm."""
    inputs = node.input[:2] if node.op_type in WEIGHTED else node.input
    return [name for name in dict.fromkeys(inputs) if graph.is_activation(name)]


def has_constant_weight(graph: Graph, node: onnx.NodeProto) -> bool:
    """Return whether a layer multiplies an activation by a constant, its second input."""
    return node.input[1] in graph.initializers and graph.is_activation(node.input[0])


def output_channels(graph: Graph, node: onnx.NodeProto) -> int:
    """Return the number of output channels of a Conv, ConvTranspose or Gemm with a constant weight."""
    shape = graph.initializers[node.input[1]].dims
    if node.op_type == "Gemm":
        return int(shape[0 if attribute(node, "transB", 0) else 1])
    groups: Any = attribute(node, "group", 1)
    return int(shape[1] * groups if node.op_type == "ConvTranspose" else shape[0])


def weight_axis(graph: Graph, node: onnx.NodeProto) -> int | None:
    """Return the output channels' axis of a layer's constant weight; None where one scale must hold for all of it.

    The latter for MatMul with other weights than matrices: onnxruntime loads scales of their channels and cannot run.
    """
    if not has_constant_weight(graph, node):
        return None
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    if node.op_type == "MatMul":
        return 1 if len(graph.initializers[node.input[1]].dims) == 2 else None
    return 1 if node.op_type == "ConvTranspose" else 0


def channel_bias(graph: Graph, node: onnx.NodeProto) -> "np.ndarray[Any, Any] | None":
    """Return the bias of a layer as it is added to each output channel; None if there is no such constant."""
    bias = graph.initializers.get(node.input[2]) if len(node.input) > 2 else None
    if bias is None:
        return None
    values, weight = to_array(bias), graph.initializers[node.input[1]]
    axis = weight_axis(graph, node)
    groups: Any = attribute(node, "group", 1) if node.op_type == "ConvTranspose" else 1
    channels = 0 if axis is None else weight.dims[axis] * groups
    rows = int(np.prod(values.shape[:-1]))
    if rows != 1 or values.shape[-1:] not in ((), (1,), (channels,)):
        return None
    return np.broadcast_to(values.reshape(values.shape[-1:]), (channels,))


def attribute(node: onnx.NodeProto, name: str, default: object) -> object:
    """Return the value of an attribute."""
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def is_padded(node: onnx.NodeProto) -> bool:
    """Return whether a convolution may see zeros beside its input."""
    pads: Any = attribute(node, "pads", ())
    return any(pads) or attribute(node, "auto_pad", b"NOTSET") in (b"SAME_UPPER", b"SAME_LOWER")


def constant_of_channels(
    graph: Graph, node: onnx.NodeProto, position: int, shape: tuple[int, ...]
) -> onnx.TensorProto | None:
    """Return a constant input with one value for all channels, or one for each; None if it has another shape.

    The shape is that of one value for each channel, (channels, 1, ...). The constant may have one axis of size 1 more.
    """
    tensor = graph.initializers.get(node.input[position]) if len(node.input) > position else None
    dims = () if tensor is None else tuple(tensor.dims)
    fits = np.prod(dims) == 1 or (dims[-len(shape) :] == shape and np.prod(dims) == shape[0])
    return tensor if fits and len(dims) <= len(shape) + 1 else None


def is_rectifier(graph: Graph, node: onnx.NodeProto) -> bool:
    """Return whether a node only clips values at 0, and perhaps from above."""
    return node.op_type in RECTIFIERS and (node.op_type == "Relu" or lowest(graph, node) == 0)


def lowest(graph: Graph, node: onnx.NodeProto) -> float | None:
    """Return the constant below which a Clip gives no values."""
    bound = graph.initializers.get(node.input[1]) if len(node.input) > 1 else None
    values = np.zeros(0) if bound is None else to_array(bound)
    return float(values.item()) if values.size == 1 else None


def sole_consumer(graph: Graph, name: str) -> onnx.NodeProto | None:
    """Return the only consumer of a tensor; None if there are others or the tensor is a graph output."""
    consumers = graph.consumers.get(name, [])
    return consumers[0] if len(consumers) == 1 and name not in graph.outputs else None


def rectified(graph: Graph, name: str) -> str:
    """Return the tensor after the rectifiers that engines fuse with the producer of this one."""
    for _ in range(MAX_CHAIN):
        node = sole_consumer(graph, name)
        if node is None or not is_rectifier(graph, node):
            break
        name = node.output[0]
    return name


def unscaled(graph: Graph, name: str) -> str:
    """Return the tensor of which this one is a product with scalars: both may have the same integers."""
    for _ in range(MAX_CHAIN):
        node = graph.producers.get(name)
        if node is None or node.op_type not in ("Mul", "Div"):
            break
        constants = [k for k, one in enumerate(node.input) if one in graph.initializers]
        if constants != [1] and (constants != [0] or node.op_type == "Div"):
            break
        if np.prod(graph.initializers[node.input[constants[0]]].dims) != 1:
            break
        name = node.input[1 - constants[0]]
    return name


def is_excluded(graph: Graph, node: onnx.NodeProto, excluded: tuple[str, ...]) -> bool:
    """Return whether a node is excluded: by its name, its operator, or a tensor that it reads or computes."""
    return any(name in excluded for name in (node.name, node.op_type, *activations(graph, node), *node.output))
