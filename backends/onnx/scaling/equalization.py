"""Cross-layer equalization: scale the channels between two layers so that both are easier to quantize.

After M. Nagel, M. van Baalen, T. Blankevoort and M. Welling, Data-Free Quantization Through Weight Equalization and
Bias Correction, ICCV 2019. With s_c = sqrt(r1_c / r2_c) both ranges of a channel become sqrt(r1_c r2_c). A layer in the
middle of a chain is second of one pair and first of the next, so sweeps over all pairs are repeated until no factor
changes. Factors are powers of two, which change nothing in floating point.
"""

import logging
from pathlib import Path

import numpy as np
import onnx

from ..correction.parameters import with_parameters
from ..feeds import Array
from ..model.normal_form import keep_body_inputs
from ..model.preparation import Prepared, prepare
from .channel_flow import Constants, Pair, find_pairs

MAX_SWEEPS = 100  # in case rounded factors keep changing
MAX_EXPONENT = 8  # of a factor in one sweep and in all: float16 must hold what it divides
logger = logging.getLogger("klquant")


def equalize(model: onnx.ModelProto | str | Path | Prepared) -> onnx.ModelProto:
    """Equalize the ranges of the weights on both sides of every channel between two layers.

    ``s_c = sqrt(r1_c / r2_c)``, rounded to a power of two, where r1_c is the largest absolute weight of the first
    layer's output channel c and r2_c that of the second layer's input channel c. The new parameters are ``W1_c / s_c``,
    ``b1_c / s_c`` and ``W2_c * s_c``; sweeps over all pairs are repeated until nothing changes. No data are needed.

    Parameters
    ----------
    model : onnx.ModelProto, path or Prepared
        A float model. It is not changed.

    Returns
    -------
    onnx.ModelProto
        A model that computes the same, to be calibrated and quantized in its place.

    Raises
    ------
    InvalidInputError
        For a model that :func:`prepare` rejects.

    Notes
    -----
    A pair is two of Conv, ConvTranspose, Gemm and MatMul with constant weights, between which lies nothing but ReLU,
    leaky ReLU, PReLU, pooling, Dropout, an Add of a constant, and Flatten, each the only reader of its input. A channel
    whose weights are all 0 on one side keeps s = 1. Activations change their ranges, for better or worse, and weights
    have one scale per output channel anyway: measure whether it helps. :func:`smooth` looks at the activations.

    Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, 2019.
    """
    prepared = prepare(model)
    graph = keep_body_inputs(prepared.graph)
    pairs, constants = find_pairs(graph), Constants(graph)
    totals = [np.zeros(len(constants.ranges(pair.first))) for pair in pairs]
    for _ in range(MAX_SWEEPS):
        steps = [_equalize_pair(constants, pair, total) for pair, total in zip(pairs, totals, strict=True)]
        totals = [total + step for total, step in zip(totals, steps, strict=True)]
        if not any(step.any() for step in steps):
            break
    logger.info("%d of %d pairs of layers equalized", sum(bool(total.any()) for total in totals), len(pairs))
    return with_parameters(prepared, constants.changed).model


def _equalize_pair(constants: Constants, pair: Pair, total: Array) -> Array:
    """Scale both layers once; return log2 of the factors, one for each channel."""
    first, second = constants.ranges(pair.first), constants.ranges(pair.second)
    used = (first > 0) & (second > 0)
    exponents = np.zeros(len(first))
    exponents[used] = np.round(np.log2(first[used] / second[used]) / 2)
    exponents = np.clip(total + exponents, -MAX_EXPONENT, MAX_EXPONENT) - total
    if exponents.any():
        constants.multiply([pair.first, *pair.added], np.exp2(-exponents))
        constants.multiply([pair.second], np.exp2(exponents))
    return exponents
