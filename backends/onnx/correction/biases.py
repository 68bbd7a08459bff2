"""Which biases of a model can be changed."""

from typing import Any, NamedTuple

import numpy as np
import onnx

from ..model.graph import Graph, to_array
from ..model.operators import attribute, channel_bias, has_constant_weight, output_channels, sole_consumer

Array = np.ndarray[Any, Any]


class Bias(NamedTuple):
    """A bias per output channel that a layer has, or can get at no cost."""

    layer: str
    """Name of the node with the weight."""
    node: str
    """Name of the node that adds the bias: the layer, or the Add behind a MatMul."""
    position: int
    """Of the bias among the inputs of that node."""
    values: Array
    """Shape (channels,)."""
    spatial: int
    """How many axes of the output follow that of the channels."""


def find_bias(graph: Graph, layer: onnx.NodeProto) -> Bias | None:
    """Return the bias of a layer with a constant weight; None if it cannot be changed."""
    if not has_constant_weight(graph, layer):
        return None
    weight = graph.initializers[layer.input[1]]
    if layer.op_type == "MatMul":
        return _behind_product(graph, layer, weight.dims[-1]) if len(weight.dims) > 1 else None
    if attribute(layer, "beta", 1.0) != 1.0:
        return None
    if len(layer.input) > 2 and layer.input[2]:
        values = channel_bias(graph, layer)
    else:
        values = np.zeros(output_channels(graph, layer), onnx.helper.tensor_dtype_to_np_dtype(weight.data_type))
    spatial = 0 if layer.op_type == "Gemm" else len(weight.dims) - 2
    return None if values is None else Bias(layer.name, layer.name, 2, values, spatial)


def _behind_product(graph: Graph, product: onnx.NodeProto, channels: int) -> Bias | None:
    """Return the constant that an Add behind a MatMul adds to each channel."""
    node = sole_consumer(graph, product.output[0])
    if node is None or node.op_type != "Add":
        return None
    position = 1 - list(node.input).index(product.output[0])
    constant = graph.initializers.get(node.input[position])
    if constant is None or list(constant.dims) not in ([], [1], [channels]):
        return None
    return Bias(product.name, node.name, position, np.broadcast_to(to_array(constant), (channels,)), 0)
