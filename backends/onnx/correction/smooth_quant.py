"""SmoothQuant: move the differences between the channels of an activation into the weights that it is multiplied by.

After G. Xiao, J. Lin, M. Seznec, H. Wu, J. Demouth and S. Han, SmoothQuant: Accurate and Efficient Post-Training
Quantization for Large Language Models, ICML 2023. Dividing channel j of x by s_j > 0 and multiplying row j of W by s_j
changes nothing in x W. One scale holds for all channels of x, so a few large channels leave few levels to all others;
s_j = max|x_j|^alpha / max|W_j|^(1 - alpha) makes them alike. alpha = 0 evens out the weights, alpha = 1 the activation.

With x in steps of d and column o of W in steps of e_o, rounding adds d^2 / 12 sum_j W_jo^2 + e_o^2 / 12 sum_j E x_j^2
to output o: no run of the model is needed to choose alpha for each layer.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from klquant.errors import InvalidInputError

from ..feeds import Array
from ..model.normal_form import all_nodes
from ..model.operators import attribute
from ..model.preparation import Prepared, prepare
from .absorption import Parameter, find_parameters, keep_body_inputs, multiply
from .parameters import unused, with_parameters
from .products import Channels, Products, find_products, observe_channels, read_by_only

GRID = tuple(k / 20 for k in range(21))
"""Values of alpha to try."""
WORTH = 0.9
"""The expected error must fall to this part of what it was."""
WORTH_A_NODE = 0.5
"""The same where it takes a Mul more, which costs time."""
MAX_LOG = 7.0
"""Of a factor: about 1000, which float16 can hold."""
TINY = float(np.finfo(np.float64).tiny)
logger = logging.getLogger("klquant")


def smooth(
    model: onnx.ModelProto | str | Path | Prepared, batches: Iterable[Any], *, alpha: float | None = None
) -> onnx.ModelProto:
    """Move the differences between the channels of activations into the weights that they are multiplied by.

    ``s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)``; x_j is divided by it and row j of W multiplied, for all MatMul and
    Gemm with a constant matrix that read x. The result computes the same as the model, up to rounding, and is to be
    calibrated and quantized in its place.

    Parameters
    ----------
    model : onnx.ModelProto, path or Prepared
        A float model. It is not changed.
    batches : iterable
        Calibration data in any form that :func:`calibrate` takes, iterated once.
    alpha : float, optional
        In 0 .. 1: how far to even out the activations (1) rather than the weights (0). Without a value it is chosen for
        each x by the error that is expected from 8 bits, and x is left alone where that does not fall.

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
    and ReLU. Where x has other readers or no such constant, a Mul by 1 / s is put before the products, if the expected
    error halves at least.

    Source: Xiao et al., SmoothQuant, 2023.
    """
    if alpha is not None and not 0 <= alpha <= 1:
        raise InvalidInputError(f"`alpha` must be in 0 .. 1, got {alpha}")
    prepared = prepare(model)
    graph = keep_body_inputs(prepared.graph)
    groups = find_products(graph)
    seen = observe_channels(prepared, groups, batches)
    values: dict[tuple[str, int], Array] = {}
    divided: list[tuple[Products, Array]] = []
    for group in groups:
        factors, ratio = _choose(group, seen[group.activation], alpha)
        parameters = find_parameters(graph, group.activation, len(factors))
        free = parameters is not None and read_by_only(graph, group)
        wanted = alpha is not None and parameters is not None
        if not wanted and ratio > (WORTH if free else WORTH_A_NODE):
            continue
        rows = [Parameter(node.name, 1, 1 if attribute(node, "transB", 0) else 0) for node in group.layers]
        multiply(graph, values, rows, factors)
        if free:
            multiply(graph, values, parameters or [], 1 / factors)
        else:
            divided.append((group, factors))
    logger.info("smoothed by %d constants and %d nodes", len(values), len(divided))
    return _with_divisions(with_parameters(prepared, values).model, divided)


def _choose(group: Products, channels: Channels, alpha: float | None) -> tuple[Array, float]:
    """Return the factors, and the error that is expected with them relative to that without."""
    before = expected_error(group, channels, np.ones(len(channels.amax)))
    tried = [_factors(group, channels, one) for one in (GRID if alpha is None else [alpha])]
    errors = [expected_error(group, channels, factors) for factors in tried]
    best = int(np.argmin(errors))
    return tried[best], errors[best] / before


def expected_error(group: Products, channels: Channels, factors: Array) -> float:
    """Return the error that rounding to 8 bits adds to the products, relative to their power, as a sum over layers."""
    step, power = (channels.amax / factors).max() / 127, channels.power / factors**2
    total = 0.0
    for weight in group.weights:
        scaled = weight * factors[:, None]
        noise = step**2 * np.square(scaled).sum() + np.square(np.abs(scaled).max(0) / 127).sum() * power.sum()
        total += noise / max(12 * (power @ np.square(scaled)).sum(), TINY)
    return float(total)


def _factors(group: Products, channels: Channels, alpha: float) -> Array:
    """Return s for each channel, with a geometric mean of 1; 1 for channels without values."""
    largest = np.max([np.abs(weight).max(1, initial=0.0) for weight in group.weights], 0)
    used = (channels.amax > 0) & (largest > 0)
    logs = np.zeros(len(used))
    logs[used] = alpha * np.log(channels.amax[used]) - (1 - alpha) * np.log(largest[used])
    logs[used] -= logs[used].mean() if used.any() else 0.0
    return np.exp(np.clip(logs, -MAX_LOG, MAX_LOG))


def _with_divisions(model: onnx.ModelProto, divided: list[tuple[Products, Array]]) -> onnx.ModelProto:
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
