"""Properties of ONNX operators: which are quantized, where their weights are, what they do to values."""

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
OBSERVED = (*WEIGHTED, *RECTIFIERS, *MOVING, *AVERAGING, *COMBINING, *CURVES)
"""Operators whose inputs and outputs an engine may quantize."""


def observed_tensors(graph: Graph) -> list[str]:
    """Return the activations that an engine may quantize, in the order of the graph."""
    names = [name for node in graph.nodes if node.op_type in OBSERVED for name in (*node.input, *node.output)]
    return [name for name in dict.fromkeys(names) if graph.is_activation(name) and rectified(graph, name) == name]


def activations(graph: Graph, node: onnx.NodeProto) -> list[str]:
    """Return the activations among the inputs of a node, without the addend of a Gemm."""
    inputs = node.input[:2] if node.op_type in WEIGHTED else node.input
    return [name for name in dict.fromkeys(inputs) if graph.is_activation(name)]


def weight_axis(graph: Graph, node: onnx.NodeProto) -> int | None:
    """Return the axis of output channels of a layer's weight (input 1); None if the weight is not constant."""
    weight = graph.initializers.get(node.input[1])
    if weight is None or not graph.is_activation(node.input[0]):
        return None
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return {"Conv": 0, "ConvTranspose": 1}.get(node.op_type, len(weight.dims) - 1)


def attribute(node: onnx.NodeProto, name: str, default: object) -> object:
    """Return the value of an attribute."""
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def is_rectifier(graph: Graph, node: onnx.NodeProto) -> bool:
    """Return whether a node only clips values at 0, and perhaps from above."""
    return node.op_type in RECTIFIERS and (node.op_type == "Relu" or _lowest(graph, node) == 0)


def _lowest(graph: Graph, node: onnx.NodeProto) -> float | None:
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


def non_negative(graph: Graph) -> set[str]:
    """Return the tensors that are never negative, for any input of the model."""
    found: set[str] = set()

    def is_non_negative(name: str) -> bool:
        constant = graph.initializers.get(name)
        return name in found or (constant is not None and bool((to_array(constant) >= 0).all()))

    for node in graph.nodes:
        first = node.op_type in (*MOVING, *AVERAGING) and is_non_negative(node.input[0])
        every = node.op_type in COMBINING and all(is_non_negative(name) for name in node.input)
        if first or every or node.op_type == "Sigmoid" or is_rectifier(graph, node):
            found.add(node.output[0])
    return found


def is_excluded(graph: Graph, node: onnx.NodeProto, excluded: tuple[str, ...]) -> bool:
    """Return whether a node is excluded: by its name, its operator, or a tensor that it reads or computes."""
    return any(name in excluded for name in (node.name, node.op_type, *activations(graph, node), *node.output))
