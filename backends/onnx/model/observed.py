"""Which tensors are observed. Those that hold infinity by design are not: attention masks, and scores they add to."""

from typing import cast

import numpy as np
import onnx

from ...settings import WEIGHTED
from .graph import FLOATS, Graph, to_array
from .operators import AVERAGING, COMBINING, CURVES, MOVING, RECTIFIERS, attribute, rectified

OBSERVED = (*WEIGHTED, *RECTIFIERS, *MOVING, *AVERAGING, *COMBINING, *CURVES)
"""Operators whose inputs and outputs an engine may quantize."""
MASKED = "holds infinity, a constant of the model, as attention masks do"
SPREADING = (
    *(*MOVING, "Where", "Add", "Sub", "Mul", "Div", "Neg", "Concat", "Expand", "Tile", "Identity", "Dropout", "Cast"),
    *("Gather", "GatherElements", "GatherND", "Slice", "Split", "Pad", "Trilu", "ScatterND", "ScatterElements"),
)
"""Operators whose results hold the infinities of their inputs."""


def observed_tensors(graph: Graph) -> list[str]:
    """Return the activations that an engine may quantize, in the order of the graph."""
    infinite = infinite_tensors(graph)
    names = [name for node in graph.nodes if node.op_type in OBSERVED for name in (*node.input, *node.output)]
    fit = [name for name in dict.fromkeys(names) if graph.is_activation(name) and name not in infinite]
    return [name for name in fit if rectified(graph, name) == name]


def infinite_tensors(graph: Graph) -> set[str]:
    """Return the activations that hold an infinity which is a constant of the model; no threshold fits them."""
    found = {name for name, tensor in graph.initializers.items() if _infinite(tensor)}
    for node in graph.nodes:
        filled = node.op_type == "ConstantOfShape" and _infinite(cast(onnx.TensorProto, attribute(node, "value", None)))
        if filled or (node.op_type in SPREADING and not found.isdisjoint(node.input)):
            found.update(node.output)
    return {name for name in found if graph.is_activation(name)}


def _infinite(tensor: onnx.TensorProto | None) -> bool:
    if tensor is None or tensor.data_type not in FLOATS:
        return False
    values = to_array(tensor)
    return bool(np.isinf(values if values.dtype.kind == "f" else values.astype(float)).any())  # bfloat16 is of kind V
