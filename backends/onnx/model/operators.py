"""What klquant knows of ONNX operators: which are quantized, and where their weights are."""

from fnmatch import fnmatchcase

import numpy as np
import onnx

from ...settings import WEIGHTED
from .graph import MAX_CHAIN, Graph, to_array

RECTIFIERS = ("Relu", "Clip")
"""What engines compute together with the layer before."""
MOVING = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze")
"""Give values that they were given: a quantizer before them serves as well behind them."""
AVERAGING = ("AveragePool", "GlobalAveragePool", "ReduceMean")
COMBINING = ("Add", "Mul", "Concat")
CURVES = ("Sigmoid", "LeakyRelu")
OBSERVED = (*WEIGHTED, *RECTIFIERS, *MOVING, *AVERAGING, *COMBINING, *CURVES)
"""Operators whose inputs and outputs an engine may quantize."""


def observed_tensors(graph: Graph) -> list[str]:
    """Return the activations that an engine may quantize, in the order in which they are computed."""
    names = [name for node in graph.nodes if node.op_type in OBSERVED for name in (*node.input, *node.output)]
    return [name for name in dict.fromkeys(names) if graph.is_activation(name) and rectified(graph, name) == name]


def activations(graph: Graph, node: onnx.NodeProto) -> list[str]:
    """Return the activations that a node computes with; what is added by a Gemm and constants are none."""
    inputs = node.input[:2] if node.op_type in WEIGHTED else node.input
    return [name for name in dict.fromkeys(inputs) if graph.is_activation(name)]


def weight_axis(graph: Graph, node: onnx.NodeProto) -> int | None:
    """Return the output channels' axis of a layer's constant weight (its input 1); None if it has none such."""
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
    """Return whether a node only cuts values off at 0, and perhaps above."""
    return node.op_type in RECTIFIERS and (node.op_type == "Relu" or lowest(graph, node) == 0)


def lowest(graph: Graph, node: onnx.NodeProto) -> float | None:
    """Return the constant below which a Clip gives no values."""
    bound = graph.initializers.get(node.input[1]) if len(node.input) > 1 else None
    values = np.zeros(0) if bound is None else to_array(bound)
    return float(values.item()) if values.size == 1 else None


def sole_consumer(graph: Graph, name: str) -> onnx.NodeProto | None:
    """Return the node that alone sees a tensor."""
    consumers = graph.consumers.get(name, [])
    return consumers[0] if len(consumers) == 1 and name not in graph.outputs else None


def rectified(graph: Graph, name: str) -> str:
    """Return the tensor behind the rectifiers that alone consume this one, which engines compute with its producer."""
    for _ in range(MAX_CHAIN):
        node = sole_consumer(graph, name)
        if node is None or not is_rectifier(graph, node):
            break
        name = node.output[0]
    return name


def matches(graph: Graph, node: onnx.NodeProto, patterns: tuple[str, ...]) -> bool:
    """Return whether a pattern means this node: by its name, its operator, or a tensor that it reads or gives."""
    names = [node.name, node.op_type, *activations(graph, node), *node.output]
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)
