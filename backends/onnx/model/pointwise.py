"""The pointwise functions that read a tensor, such as SiLU = x * Sigmoid(x), however they are written."""

import math
from collections.abc import Iterable

import numpy as np
import onnx
from onnx import TensorProto, helper

from klquant.errors import ModelError

from ...curves import Array, Curve
from ..execution import open_onnxruntime
from .graph import Graph, node_key
from .preparation import Prepared
from .signs import ONNX

POINTWISE = (
    *("Relu", "Clip", "LeakyRelu", "Elu", "Celu", "Selu", "ThresholdedRelu", "Sigmoid", "HardSigmoid", "Tanh", "Erf"),
    *("Gelu", "HardSwish", "Mish", "Softplus", "Softsign", "Abs", "Neg", "Exp", "Sqrt", "Reciprocal", "Identity"),
    *("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max"),
)
"""Operators that compute each value from one other, if all their further inputs are constants of one value."""
MAX_NODES = 20  # of a function


def find_curves(prepared: Prepared, points: dict[str, Array]) -> dict[str, Curve]:
    """Return the functions that read tensors, evaluated at points.

    Parameters
    ----------
    prepared : Prepared
        A float model.
    points : dict
        Where to evaluate the functions, by name of the tensor.

    Returns
    -------
    dict
        Without tensors that anything reads but pointwise functions, and functions that onnxruntime cannot evaluate.
    """
    found = {}
    for name, where in points.items():
        nodes = functions_of(prepared.graph, name)
        if nodes and prepared.graph.types.get(name) == TensorProto.FLOAT:
            values = _evaluated(prepared, name, nodes, where)
            if values is not None:
                found[name] = Curve(where, values)
    return found


def functions_of(graph: Graph, name: str) -> list[onnx.NodeProto]:
    """Return the nodes of the pointwise functions of a tensor; none if anything else reads it, or nothing does."""
    derived, nodes = {name}, dict[str, onnx.NodeProto]()
    waiting = list(graph.consumers.get(name, []))
    while waiting and len(nodes) < MAX_NODES:
        node = waiting.pop(0)
        if node_key(node) not in nodes and _is_pointwise(graph, node, derived):
            nodes[node_key(node)] = node
            derived.add(node_key(node))
            waiting += graph.consumers.get(node_key(node), [])
    return list(nodes.values()) if name not in results(graph, [name, *nodes], nodes) else []


def results(graph: Graph, names: Iterable[str], inner: Iterable[str]) -> list[str]:
    """Return which of these tensors are outputs of the model, or read by nodes outside."""
    known = set(inner)
    readers = {name: {node_key(node) for node in graph.consumers.get(name, [])} for name in names}
    return [name for name, keys in readers.items() if name in graph.outputs or not keys <= known]


def _is_pointwise(graph: Graph, node: onnx.NodeProto, derived: set[str]) -> bool:
    def is_single(name: str) -> bool:
        constant = graph.initializers.get(name)
        return not name or (constant is not None and math.prod(constant.dims) == 1)

    known = node.op_type in POINTWISE and node.domain in ONNX and len(node.output) == 1
    return known and all(name in derived or is_single(name) for name in node.input)


def _evaluated(prepared: Prepared, name: str, nodes: list[onnx.NodeProto], points: Array) -> Array | None:
    """Return the values of the functions at points, shape (functions, points); None if they cannot be computed."""
    graph, keys = prepared.graph, [node_key(node) for node in nodes]
    ordered = [node for node in graph.nodes if node_key(node) in keys]
    constants = {one for node in nodes for one in node.input if one in graph.initializers}
    ends = results(graph, keys, keys)
    inner = helper.make_graph(
        ordered,
        "function",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [len(points)])],
        [helper.make_tensor_value_info(one, TensorProto.FLOAT, None) for one in ends],
        [graph.initializers[one] for one in sorted(constants)],
    )
    versions = {"opset_imports": prepared.model.opset_import, "ir_version": prepared.model.ir_version}
    try:
        with open_onnxruntime(helper.make_model(inner, **versions), optimized=False, threads=1) as session:
            found = session(ends, {name: points.astype(np.float32)})
    except ModelError:
        return None
    values = np.stack([found[one].reshape(-1).astype(np.float64) for one in ends])
    return values if np.isfinite(values).all() else None
