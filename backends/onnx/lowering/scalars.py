"""Scalars behind a layer, as trained scales and offsets of activations: its own weight and bias take them up."""

from typing import Any

import numpy as np
import onnx

from ..correction.parameters import with_parameters
from ..feeds import Array
from ..model.graph import MAX_CHAIN, Graph, to_array
from ..model.operators import attribute, channel_bias, has_constant_weight, output_channels
from ..model.preparation import Prepared
from .draft import Draft

LAYERS = ("Conv", "ConvTranspose", "Gemm")


def fold_scalars(prepared: Prepared, spared: set[str]) -> Prepared:
    """Fold Mul, Div, Add and Sub by a scalar into the Conv, ConvTranspose or Gemm before them.

    Parameters
    ----------
    prepared : Prepared
    spared : set of str
        Names of the nodes to leave as they are.
    """
    draft, values = Draft(prepared), dict[tuple[str, int], Array]()
    for node in prepared.graph.nodes:
        if node.op_type in LAYERS and node.name not in spared and (found := _folded(draft, node, spared)):
            scale, offset, last = found
            weight, bias = _parameters(prepared.graph, node)
            values[node.name, 1] = (weight.astype(np.float64) * scale).astype(np.float32)
            values[node.name, 2] = (bias.astype(np.float64) * scale + offset).astype(np.float32)
            renamed = onnx.NodeProto.FromString(node.SerializeToString())
            renamed.output[0] = last
            draft.replace(node, [renamed])
    return with_parameters(draft.finished(), values) if values else prepared


def _folded(draft: Draft, layer: onnx.NodeProto, spared: set[str]) -> tuple[float, float, str] | None:
    """Remove the scalars behind a layer; return the factor, the offset and the name of the result."""
    graph = draft.graph
    if not _is_plain(graph, layer):
        return None
    scale, offset, name = 1.0, 0.0, layer.output[0]
    for _ in range(MAX_CHAIN):
        readers = graph.consumers.get(name, [])
        if len(readers) != 1 or name in graph.outputs or readers[0].name in spared:
            break
        step = affine(draft, readers[0], name)
        if step is None:
            break
        draft.replace(readers[0], [])
        scale, offset, name = scale * step[0], offset * step[0] + step[1], readers[0].output[0]
    return None if name == layer.output[0] else (scale, offset, name)


def affine(draft: Draft, node: onnx.NodeProto, name: str) -> tuple[float, float] | None:
    """Return a and b where a node computes a x + b of a tensor x by a scalar."""
    if node.op_type not in ("Mul", "Div", "Add", "Sub") or list(node.input).count(name) != 1:
        return None
    position = list(node.input).index(name)
    value = draft.scalar(node.input[1 - position])
    if value is None or len(draft.graph.initializers[node.input[1 - position]].dims) > draft.graph.ranks.get(name, 0):
        return None
    if node.op_type == "Mul":
        return (value, 0.0) if value else None
    if node.op_type == "Add":
        return 1.0, value
    if node.op_type == "Sub":
        return (-1.0, value) if position else (1.0, -value)
    return (1 / value, 0.0) if value and not position else None


def _is_plain(graph: Graph, layer: onnx.NodeProto) -> bool:
    if not has_constant_weight(graph, layer) or graph.types[layer.input[1]] != onnx.TensorProto.FLOAT:
        return False
    factors: list[Any] = [attribute(layer, name, 1.0) for name in ("alpha", "beta")]
    without = len(layer.input) < 3 or not layer.input[2]
    return factors == [1.0, 1.0] and (without or channel_bias(graph, layer) is not None)


def _parameters(graph: Graph, layer: onnx.NodeProto) -> tuple[Array, Array]:
    """Return the weight and the bias of a layer; zeros if it has none."""
    bias = channel_bias(graph, layer) if len(layer.input) > 2 else None
    zeros = np.zeros(output_channels(graph, layer), np.float32)
    return to_array(graph.initializers[layer.input[1]]), zeros if bias is None else bias
