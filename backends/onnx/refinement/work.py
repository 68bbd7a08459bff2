"""How much a model computes: the multiplications of its layers, and the values of the functions between them."""

from typing import NamedTuple

import numpy as np
import onnx

from ...settings import WEIGHTED
from ..execution import Feed, open_onnxruntime, with_outputs
from ..model.graph import Graph, node_key
from ..model.operators import RECTIFIERS, has_constant_weight, output_channels
from ..model.pointwise import functions_of
from ..model.preparation import Prepared

MANY = 100.0
"""Multiplications for each value of a function that let it stay in floating point.

onnxruntime 1.32 on one core, time with all functions in INT8 and in floating point, as parts of that of FP32: 0.36 and
0.66 with 130 multiplications for each value (PP-OCRv4 recognizer), 0.41 and 0.52 with 300 (YOLOv8n); but 0.66 and 0.97
with 61 (PP-LCNet).
"""


class Work(NamedTuple):
    """What a model computes for some data."""

    multiplications: dict[str, float]
    """By name of the layer."""
    functions: tuple[str, ...]
    """Names of the nodes between the layers that compute pointwise functions, such as SiLU."""
    values: int
    """Of these functions."""

    def functions_are_cheap(self) -> bool:
        """Return whether the functions take little time beside the layers even in floating point."""
        return 0 < MANY * self.values <= sum(self.multiplications.values())


def work_of(prepared: Prepared, feed: Feed) -> Work:
    """Return what a model computes for a batch."""
    graph = prepared.graph
    layers = [node for node in graph.nodes if node.op_type in WEIGHTED and has_constant_weight(graph, node)]
    functions = _functions(graph)
    names = list(dict.fromkeys([*(node.output[0] for node in layers), *functions]))
    if not names:
        return Work({}, (), 0)
    with open_onnxruntime(with_outputs(prepared.model, names), optimized=True) as session:
        sizes = {name: found.size for name, found in session(names, feed).items()}
    return Work(
        {node.name: sizes[node.output[0]] * _multiplications(graph, node) for node in layers},
        tuple(dict.fromkeys(node.name for nodes in functions.values() for node in nodes)),
        sum(sizes[name] for name in functions),
    )


def _functions(graph: Graph) -> dict[str, list[onnx.NodeProto]]:
    """Return the nodes of pointwise functions by the tensor that they read, without those that layers absorb."""
    found, inner = dict[str, list[onnx.NodeProto]](), set[str]()
    for name in (name for node in graph.nodes for name in node.output if graph.is_activation(name)):
        nodes = [] if name in inner else functions_of(graph, name)
        if any(node.op_type not in RECTIFIERS for node in nodes):
            found[name] = nodes
            inner.update(node_key(node) for node in nodes)
    return found


def _multiplications(graph: Graph, node: onnx.NodeProto) -> float:
    """Return the number of multiplications for each value of a layer."""
    shape = graph.initializers[node.input[1]].dims
    channels = shape[-1] if node.op_type == "MatMul" else output_channels(graph, node)
    return float(np.prod(shape)) / channels
