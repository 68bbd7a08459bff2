"""SmoothQuant: move the differences between the channels of an activation into the weights that it is multiplied by.

After G. Xiao, J. Lin, M. Seznec, H. Wu, J. Demouth and S. Han, SmoothQuant: Accurate and Efficient Post-Training
Quantization for Large Language Models, ICML 2023. Dividing channel j of x by s_j > 0 and multiplying row j of W by s_j
changes nothing in x W. One scale holds for all channels of x, so a few large channels leave few levels to all others;
s_j = max|x_j|^alpha / max|W_j|^(1 - alpha) makes them alike. alpha = 0 evens out the weights, alpha = 1 the activation.
"""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper

from klquant.errors import InvalidInputError

from ...smoothing import WORTH, WORTH_A_NODE, choose_factors
from ..feeds import Array
from ..model.graph import Graph, copied, read_graph
from ..model.normal_form import all_nodes
from ..model.observed import observed_tensors
from ..model.operators import attribute, has_constant_weight
from ..model.preparation import Prepared, prepare
from ..qdq.plan import EVERYONE
from ..qdq.rules import make_plan
from .absorption import find_views, keep_body_inputs
from .channel_flow import Constants, View, find_pairs
from .channels import observe_channels
from .parameters import unused, with_parameters

logger = logging.getLogger("klquant")


class _Group(NamedTuple):
    """Layers that read the channels of one activation."""

    activation: str
    axis: int
    layers: list[onnx.NodeProto]
    weights: list[View]
    before: list[View] | None
    """Constants that can take up the inverse factors; None if there are none."""
    free: bool
    """Whether they can, because nothing else reads the activation."""


def smooth(
    model: onnx.ModelProto | str | Path | Prepared,
    batches: Iterable[Any],
    *,
    alpha: float | None = None,
    convolutions: bool = False,
) -> onnx.ModelProto:
    """Move the differences between the channels of activations into the weights that they are multiplied by.

    ``s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)``; x_j is divided by it and W_j multiplied, for all MatMul and Gemm
    with a constant matrix that read x. The result computes the same as the model,
    up to rounding; calibrate and quantize it in the model's place.

    Parameters
    ----------
    model : onnx.ModelProto, path or Prepared
        A float model. It is not changed.
    batches : iterable
        Calibration data in any form that :func:`calibrate` takes, iterated once.
    alpha : float, optional
        In 0 .. 1: how far to even out the activations (1) rather than the weights (0). Without a value it is chosen for
        each x by the error that is expected from 8 bits, and x is left alone where that does not fall.
    convolutions : bool
        Also smooth the input of a Conv behind another layer. On trained networks that gained nothing so far.

    Returns
    -------
    onnx.ModelProto

    Raises
    ------
    InvalidInputError
        For an alpha outside 0 .. 1, a model that :func:`prepare` rejects, no batches or batches that do not fit, NaN or
        infinity.

    Notes
    -----
    Constants take up 1 / s where they can: of a LayerNormalization, a Mul, or another MatMul or Gemm, also through Add
    and ReLU. Where x has other readers or no such constant, a Mul by 1 / s is put before the products, if x is computed
    in floating point and the expected error falls by a fifth at least. In front of a Conv only the layer before can
    take them up, through what :func:`equalize` lists. Without `alpha`, a channel counts as at least an eighth of the
    largest: what was small in some data may be larger in other data.

    Source: Xiao et al., SmoothQuant, 2023.
    """
    if alpha is not None and not 0 <= alpha <= 1:
        raise InvalidInputError(f"`alpha` must be in 0 .. 1, got {alpha}")
    return smoothed(prepare(model), batches, alpha=alpha, convolutions=convolutions).model


class Smoothed(NamedTuple):
    """What SmoothQuant made of a model."""

    model: onnx.ModelProto
    tensors: dict[str, str]
    """Of each tensor whose channels are scaled, the name in the model before."""


def smoothed(
    prepared: Prepared,
    batches: Iterable[Any],
    *,
    alpha: float | None = None,
    convolutions: bool = False,
    wanted: Callable[[str], bool] = lambda name: True,
) -> Smoothed:
    """Return what :func:`smooth` returns; only tensors that are wanted are scaled, for layers or operators that are."""
    graph = keep_body_inputs(prepared.graph)
    found = [*_products(graph), *(_convolutions(graph) if convolutions else [])]
    groups = [group for group in found if _is_wanted(graph, group, wanted)]
    if not groups:
        return Smoothed(prepared.model, {})
    seen = observe_channels(prepared, {group.activation: group.axis for group in groups}, batches)
    constants, divisible = Constants(graph), _divisible(prepared, groups)
    divided: list[tuple[_Group, Array]] = []
    tensors: dict[str, str] = {}
    for group in groups:
        grouped = [(constants.grouped(view), view.axis) for view in group.weights]
        weights = [values if axis == 2 else values.swapaxes(1, 2) for values, axis in grouped]
        factors, ratio = choose_factors(weights, seen[group.activation], alpha)
        certain = alpha is not None and group.before is not None
        possible = group.free or group.activation in divisible
        if not possible or (not certain and ratio > (WORTH if group.free else WORTH_A_NODE)):
            continue
        constants.multiply(group.weights, factors)
        if group.free:
            constants.multiply(group.before or [], 1 / factors)
            tensors |= {name: name for name in _scaled(graph, group)}
        else:
            divided.append((group, factors))
    logger.info("smoothed by %d constants and %d nodes", len(constants.changed), len(divided))
    result = _with_divisions(with_parameters(prepared, constants.changed).model, divided)
    inputs = {node.name: node.input for node in result.graph.node}
    tensors |= {inputs[group.layers[0].name][0]: group.activation for group, _ in divided}
    return Smoothed(result, tensors)


def _is_wanted(graph: Graph, group: _Group, wanted: Callable[[str], bool]) -> bool:
    layers = any(wanted(layer.name) and wanted(layer.op_type) for layer in group.layers)
    return layers and all(map(wanted, _scaled(graph, group)))


def _scaled(graph: Graph, group: _Group) -> list[str]:
    """Return the activation of a group, and if constants take up the factors, all tensors up to these constants."""
    names = [group.activation]
    if not group.free:
        return names
    first = {view.node for view in group.before or []}
    while (node := graph.producers[names[-1]]).name not in first or node.op_type == "Add":
        names.append(next(name for name in node.input if name not in graph.initializers))
    return names


def _products(graph: Graph) -> list[_Group]:
    """Return the MatMul and Gemm nodes with a constant matrix, by the activation whose last axis they multiply."""
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in (one for one in graph.nodes if one.op_type in ("MatMul", "Gemm")):
        constant = has_constant_weight(graph, node) and len(graph.initializers[node.input[1]].dims) == 2
        if constant and not attribute(node, "transA", 0):
            found.setdefault(node.input[0], []).append(node)
    return [_group(graph, name, layers) for name, layers in found.items()]


def _group(graph: Graph, name: str, layers: list[onnx.NodeProto]) -> _Group:
    shapes = [(list(graph.initializers[node.input[1]].dims), attribute(node, "transB", 0)) for node in layers]
    views = [
        View(node.name, 1, (1, *shape, 1) if transposed else (1, shape[0], shape[1], 1), 2 if transposed else 1)
        for node, (shape, transposed) in zip(layers, shapes, strict=True)
    ]
    before = find_views(graph, name, views[0].shape[views[0].axis])
    others = {node.name for node in graph.consumers[name]} - {node.name for node in layers}
    once = all(list(node.input).count(name) == 1 for node in layers)
    return _Group(
        name, -1, layers, views, before, before is not None and once and not others and name not in graph.outputs
    )


def _convolutions(graph: Graph) -> list[_Group]:
    """Return the Conv nodes that can be scaled together with the layer before."""
    nodes = {node.name: node for node in graph.nodes}
    pairs = [pair for pair in find_pairs(graph) if nodes[pair.second.node].op_type == "Conv"]
    return [
        _Group(second.input[0], 1, [second], [pair.second], [pair.first, *pair.added], free=True)
        for pair in pairs
        for second in (nodes[pair.second.node],)
    ]


def _divisible(prepared: Prepared, groups: list[_Group]) -> set[str]:
    """Return the activations that a Mul can read before they are quantized: where INT8 kernels compute them it cannot.

    That is a question of the engine; onnxruntime quantizes the outputs of more operators than the others.
    """
    trial = _with_divisions(copied(prepared.model), [(group, np.ones(1)) for group in groups if not group.free])
    graph = read_graph(trial)
    new = [node for node in graph.nodes if node.output[0] not in prepared.graph.producers]
    types = {node.output[0]: graph.types[node.input[0]] for node in new}
    graph = graph._replace(types=graph.types | types)
    readers = make_plan(graph, observed_tensors(graph), "onnxruntime").readers
    return {node.input[0] for node in new if not readers.get(node.input[0], set()) & {EVERYONE, node.name}}


def _with_divisions(model: onnx.ModelProto, divided: list[tuple[_Group, Array]]) -> onnx.ModelProto:
    """Put a Mul by the inverse factors before the products of each group, in place."""
    names = {text for node in all_nodes(model.graph) for text in (*node.input, *node.output, node.name)}
    dtypes = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    before: dict[str, onnx.NodeProto] = {}
    nodes = {node.name: node for node in model.graph.node}
    for group, factors in divided:
        result, constant = (unused(f"{group.activation}_{end}", names) for end in ("smooth", "factors"))
        layers = [nodes[layer.name] for layer in group.layers]
        dtype = helper.tensor_dtype_to_np_dtype(dtypes[layers[0].input[1]])
        model.graph.initializer.append(numpy_helper.from_array((1 / factors).astype(dtype), constant))
        name = unused(f"{result}/Mul", names)
        before[layers[0].name] = helper.make_node("Mul", [group.activation, constant], [result], name)
        for layer in layers:
            layer.input[0] = result
    ordered = [one for node in model.graph.node for one in (before.get(node.name), node) if one is not None]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    return model
