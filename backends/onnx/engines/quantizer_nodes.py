"""The quantizers and dequantizers of a graph: their parameters, and the nodes between them."""

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx.external_data_helper import uses_external_data

from ..model.graph import MAX_CHAIN, Graph, node_key, to_array
from ..model.operators import MOVING, attribute

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
INT8, UINT8, INT32 = onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT32
_AXIS = 1  # ONNX's default


class Parameters(NamedTuple):
    """The parameters of a QuantizeLinear or DequantizeLinear; None for those that are not constant."""

    scale: "np.ndarray[Any, Any] | None"
    zero_point: "np.ndarray[Any, Any] | None"
    dtype: int
    """Type of the quantized values, of onnx.TensorProto."""
    axis: int

    def __str__(self) -> str:
        scale = "unknown" if self.scale is None else f"{self.scale.flat[0]:.6g}{' ...' if self.scale.size > 1 else ''}"
        zero_point = "unknown" if self.zero_point is None else self.zero_point.flat[0]
        return f"{type_name(self.dtype)}, scale {scale}, zero point {zero_point}"

    def same_grid(self, other: "Parameters") -> bool:
        """Return whether scales and zero points are known and equal."""
        mine, its = (self.scale, self.zero_point), (other.scale, other.zero_point)
        known = [(a, b) for a, b in zip(mine, its, strict=True) if a is not None and b is not None]
        return len(known) == 2 and all(np.array_equal(a, b) for a, b in known)

    def bounds(self) -> tuple[float, float]:
        """Return the smallest and the largest value that the integers represent."""
        if self.scale is None or self.zero_point is None:
            return -np.inf, np.inf
        limits = np.iinfo(onnx.helper.tensor_dtype_to_np_dtype(self.dtype))
        zero_point = self.zero_point.astype(np.int64)
        least, largest = (self.scale * (limit - zero_point) for limit in (limits.min, limits.max))
        return float(least.min()), float(largest.max())


class Tail(NamedTuple):
    """A chain of nodes after a tensor, up to a branch or a node of another type."""

    between: list[onnx.NodeProto]
    tensor: str
    """Output of the last node."""
    consumers: list[onnx.NodeProto]

    def quantizer(self, graph: Graph) -> onnx.NodeProto | None:
        """Return the QuantizeLinear that is the only reader of the last tensor."""
        alone = len(self.consumers) == 1 and self.tensor not in graph.outputs
        return self.consumers[0] if alone and self.consumers[0].op_type == QUANTIZE else None


def label(node: onnx.NodeProto) -> str:
    """Return the name of a node for messages."""
    return str(node.name) or node_key(node)


def type_name(dtype: int) -> str:
    """Return the name of an element type, such as `int8`."""
    return str(onnx.TensorProto.DataType.Name(dtype)).lower()


def constant(graph: Graph, name: str) -> "np.ndarray[Any, Any] | None":
    """Return the value of an initializer or a Constant node; None for other tensors and for external data."""
    if name in graph.initializers:
        tensor = graph.initializers[name]
        return None if uses_external_data(tensor) else to_array(tensor)
    producer = graph.producers.get(name)
    if producer is None or producer.op_type != "Constant":
        return None
    value: Any = attribute(producer, "value", None)
    return None if value is None else to_array(value)


def parameters(graph: Graph, node: onnx.NodeProto) -> Parameters:
    """Return the parameters of a QuantizeLinear or DequantizeLinear."""
    scale = constant(graph, node.input[1])
    axis: Any = attribute(node, "axis", _AXIS)
    if len(node.input) > 2 and node.input[2]:
        zero_point = constant(graph, node.input[2])
        known = graph.types.get(node.input[2]) if zero_point is None else None
        dtype = known or (UINT8 if zero_point is None else onnx.helper.np_dtype_to_tensor_dtype(zero_point.dtype))
        return Parameters(scale, zero_point, dtype, axis)
    if node.op_type == DEQUANTIZE:
        dtype = graph.types.get(node.input[0], UINT8)
    else:
        output: Any = attribute(node, "output_dtype", 0)
        dtype = output or UINT8
    return Parameters(scale, None if scale is None else np.zeros(scale.shape, np.int64), dtype, axis)


def weight_shape(graph: Graph, node: onnx.NodeProto) -> tuple[int, ...] | None:
    """Return the shape of the constant that a quantizer or a Q/DQ pair is applied to; None for activations."""
    name = node.input[0]
    if name in graph.initializers:
        return tuple(graph.initializers[name].dims)
    producer = graph.producers.get(name)
    if producer is not None and producer.op_type == QUANTIZE and node.op_type == DEQUANTIZE:
        return weight_shape(graph, producer)
    value = constant(graph, name)
    return None if value is None else value.shape


def dequantizer(graph: Graph, name: str) -> onnx.NodeProto | None:
    """Return the DequantizeLinear that produces a tensor."""
    producer = graph.producers.get(name)
    return producer if producer is not None and producer.op_type == DEQUANTIZE else None


def axes_of_scales(graph: Graph, layer: onnx.NodeProto) -> tuple[int, int] | None:
    """Return the axis of a weight's scales and the axis of its output channels; None for a single scale."""
    source = dequantizer(graph, layer.input[1])
    shape = None if source is None else weight_shape(graph, source)
    if source is None or shape is None:
        return None
    found = parameters(graph, source)
    if found.scale is None or found.scale.size == 1:
        return None
    products = {"Gemm": 0 if attribute(layer, "transB", 0) else 1, "MatMul": len(shape) - 1}
    return found.axis % len(shape), {"Conv": 0, "ConvTranspose": 1, **products}[layer.op_type]


def follow(graph: Graph, name: str, passed: Collection[str]) -> Tail:
    """Follow a tensor through nodes of the types `passed`, while each is the only reader of the one before."""
    between: list[onnx.NodeProto] = []
    while True:
        consumers = graph.consumers.get(name, [])
        ends = len(consumers) != 1 or name in graph.outputs or consumers[0].op_type not in passed
        if ends or len(between) == MAX_CHAIN:
            return Tail(between, name, consumers)
        between.append(consumers[0])
        name = consumers[0].output[0]


def quantized_inputs(graph: Graph) -> set[str]:
    """Return the inputs and tables of quantized values; other inputs of 8 bits, such as images, are cast to floats."""
    wanted = {name for name in graph.outputs if graph.types.get(name) in (INT8, UINT8)}
    for node in reversed(graph.nodes):
        integer = node.op_type == DEQUANTIZE or node.op_type.startswith("QLinear") or node.op_type.endswith("Integer")
        if integer or (node.op_type in MOVING and node.output[0] in wanted):
            wanted.update(node.input)
    tables = {node.input[0] for node in graph.nodes if node.op_type == "Gather" and _is_dequantized(graph, node)}
    known = {*graph.inputs, *(tables & graph.initializers.keys())}
    return {name for name in known if name in wanted | tables and graph.types.get(name) in (INT8, UINT8)}


def _is_dequantized(graph: Graph, node: onnx.NodeProto) -> bool:
    return any(reader.op_type == DEQUANTIZE for reader in graph.consumers.get(node.output[0], []))


def behind_quantizers(graph: Graph) -> set[str]:
    """Return the tensors that quantized values have an influence on; only nodes that read one can run in int8."""
    found = quantized_inputs(graph)
    for node in graph.nodes:
        if "Quantize" in node.op_type or found.intersection(node.input):
            found.update(node.output)
    return found


def depends_on_input(graph: Graph) -> set[str]:
    """Return the tensors that depend on the model's inputs."""
    found = set(graph.inputs)
    for node in graph.nodes:
        if found.intersection(node.input):
            found.update(node.output)
    return found


def listed(nodes: Iterable[onnx.NodeProto]) -> str:
    """Return a list of nodes for messages."""
    return ", ".join(f"{node.op_type} `{label(node)}`" for node in nodes)
