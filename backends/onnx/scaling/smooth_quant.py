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

import onnx

from klquant.errors import InvalidInputError

from ...smoothing import WORTH, WORTH_A_NODE, Reader, choose_factors
from ..correction.parameters import with_parameters
from ..feeds import Array
from ..model.graph import Graph
from ..model.normal_form import keep_body_inputs
from ..model.preparation import Prepared, prepare
from .channel_flow import Constants, Scaling
from .channels import observe_channels
from .convolutions import find_convolutions
from .products import divisible, find_products, with_divisions

HEADROOM = 2.0
"""How many times larger a channel of a convolutional network may be in other data.

Measured with all layers in INT8, on photos and lines that the factors do not come from, in dB: without scaling, with a
headroom of 1, 2, and 3 to 4. PP-OCRv4's text detector (12 photos): 16.6, 13.9, 16.5, 16.9 to 17.5. Its recognizer (32
lines): 18.0, 20.0, 20.0, 18.0.
"""
logger = logging.getLogger("klquant")


def smooth(
    model: onnx.ModelProto | str | Path | Prepared,
    batches: Iterable[Any],
    *,
    alpha: float | None = None,
    convolutions: bool = True,
) -> onnx.ModelProto:
    """Move the differences between the channels of activations into the weights that they are multiplied by.

    ``s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)``; x_j is divided by it and W_j multiplied, for all MatMul and Gemm
    with a constant matrix that read x, and for convolutions where it costs no node. The result computes the same as the
    model, up to rounding; calibrate and quantize it in the model's place.

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
        Also scale between the constants of convolutional networks: weights of convolutions, and a Mul with the Add of
        a constant behind it.

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
    in floating point and the expected error falls by a fifth at least. With convolutions there is never a new node: all
    that reads x must take s back, through nothing but ReLU, PReLU, pooling, an Add of a constant or a Mul. Without
    `alpha`, a channel counts as at least an eighth of the largest: what was small in some data may be larger in other
    data.

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
    convolutions: bool = True,
    wanted: Callable[[str], bool] = lambda name: True,
) -> Smoothed:
    """Return what :func:`smooth` returns; only tensors that are wanted are scaled, for layers or operators that are."""
    graph = keep_body_inputs(prepared.graph)
    found = [*find_products(graph), *(find_convolutions(graph) if convolutions else [])]
    scalings = [one for one in found if _is_wanted(graph, one, wanted)]
    if not scalings:
        return Smoothed(prepared.model, {})
    seen = observe_channels(prepared, {name: one.axis for one in scalings for name, _ in one.behind}, batches)
    constants, possible = Constants(graph), divisible(prepared, scalings)
    divided: list[tuple[Scaling, Array]] = []
    tensors: dict[str, str] = {}
    for one in scalings:
        readers = [Reader(constants.by_input(view), seen[name]) for name, view in one.behind]
        factors, ratio = choose_factors(readers, alpha, HEADROOM if one.axis == 1 else 1.0)
        if one.before and (alpha is not None or ratio <= WORTH):
            constants.multiply([view for _, view in one.behind], factors)
            constants.multiply(one.before, 1 / factors)
            tensors |= {name: name for name in one.tensors}
        elif not one.before and ratio <= WORTH_A_NODE and one.tensors[0] in possible:
            constants.multiply([view for _, view in one.behind], factors)
            divided.append((one, factors))
    logger.info("smoothed by %d constants and %d nodes", len(constants.changed), len(divided))
    result = with_divisions(with_parameters(prepared, constants.changed).model, divided)
    inputs = {node.name: node.input for node in result.graph.node}
    tensors |= {inputs[one.behind[0][1].node][0]: one.tensors[0] for one, _ in divided}
    return Smoothed(result, tensors)


def _is_wanted(graph: Graph, scaling: Scaling, wanted: Callable[[str], bool]) -> bool:
    readers = {view.node for _, view in scaling.behind}
    layers = any(wanted(node.name) and wanted(node.op_type) for node in graph.nodes if node.name in readers)
    return layers and all(map(wanted, scaling.tensors))
