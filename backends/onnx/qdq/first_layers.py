"""The first layers of a network for images, as far as they are faster in floating point in onnxruntime.

INT8 kernels have too little to do for each pixel of many pixels with few channels. Measured on onnxruntime 1.32 (x86):
a PP-LCNet takes 0.76 instead of 0.93 of the FP32 time with two layers of 33 in floating point, CenterFace 0.59
instead of 0.68 with three of 63.
"""

from collections.abc import Iterator
from itertools import islice

import onnx

from ...settings import WEIGHTED
from ..model.graph import Graph
from ..model.operators import activations, attribute, has_constant_weight

FASTER = "onnxruntime runs layers with few channels and many pixels faster in floating point"
COLOURS = 4  # channels of an image at most
NARROW = 16  # output channels
WIDER = 32  # of the first layer, or of a depthwise one
MIN_LAYERS = 20  # of a network
SHARE = 10  # at most one of so many layers


def first_layers(graph: Graph) -> list[str]:
    """Return the names of the first layers that should stay in floating point, at most a tenth of all."""
    total = sum(node.op_type in WEIGHTED for node in graph.nodes)
    return list(islice(_first(graph), total // SHARE)) if total >= MIN_LAYERS else []


def _first(graph: Graph) -> Iterator[str]:
    """Yield the names of narrow convolutions with nothing but others of them before."""
    before = set(graph.inputs)
    for node in graph.nodes:
        if not before.issuperset(activations(graph, node)):
            continue
        if node.op_type in WEIGHTED:
            if not _is_narrow(graph, node):
                continue
            yield node.name
        before.update(node.output)


def _is_narrow(graph: Graph, node: onnx.NodeProto) -> bool:
    if node.op_type != "Conv" or not has_constant_weight(graph, node):
        return False
    outputs, inputs, *kernel = graph.initializers[node.input[1]].dims
    is_first, groups = node.input[0] in graph.inputs, attribute(node, "group", 1)
    if len(kernel) != 2 or (is_first and inputs > COLOURS):
        return False
    wider = groups == outputs > 1 if not is_first else groups == 1
    return bool(outputs <= (WIDER if wider else NARROW))
