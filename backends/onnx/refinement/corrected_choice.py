"""Correct biases, and judge by it whether what was left out or widened before is still worth it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ...warning import quiet
from ..correction.adaround import MAX_BATCHES, adapt_rounding
from ..correction.bias_correction import correct_biases
from ..correction.data import first_samples, halved, read_feeds, spread
from ..correction.output_error import output_errors
from ..correction.parameters import with_parameters
from ..feeds import Array
from ..model.preparation import Prepared
from ..placement import Placement
from .layer_choice import NOTICEABLE, SAMPLES, Place, Refined

JUDGED = 8  # batches


class Chosen(NamedTuple):
    """How to quantize a model."""

    refined: Refined
    placement: Placement
    """In a float model with corrected biases."""
    corrections: Mapping[str, float] = {}
    """The largest one of each layer; empty if biases are not corrected."""


def best_corrected(
    where: Place,
    tried: Sequence[Refined],
    batches: Iterable[Any],
    correct_bias: bool | None,
    *,
    adaround: bool = False,
) -> Chosen:
    """Correct the biases of each; return the first one, or a later one that lowers the error of the outputs.

    Bias correction may remove noise for which layers were left out or channels scaled, and other ranges may leave less
    to correct. With `adaround` the weights of that one are rounded for the least error of their layers, and its biases
    corrected anew.
    """
    some = list(batches)
    if not adaround:
        return _best_corrected(where, tried, some, correct_bias)
    best = tried[0] if len(tried) == 1 else _best_corrected(where, tried, some, correct_bias).refined
    placed = where.placed(best)
    feeds = spread(list(read_feeds(where.prepared, some)), MAX_BATCHES)
    with quiet():
        quantized, layers = where.write(placed), placed.plan.weights
        rounded = adapt_rounding(placed.prepared, quantized, layers, feeds)
        return _corrected(where, best, some, correct_bias, rounded)


def _best_corrected(where: Place, tried: Sequence[Refined], some: Sequence[Any], correct_bias: bool | None) -> Chosen:
    with quiet():
        found = [_corrected(where, one, some, correct_bias) for one in tried]
        if len(found) == 1:
            return found[0]
        models = [where.write(one.placement) for one in found]
    feeds = halved(where.prepared, list(read_feeds(where.prepared, some)))
    judging = first_samples(where.prepared, spread(feeds[1::2], JUDGED), SAMPLES)
    errors = output_errors(where.prepared, models, judging, optimized=where.engine == "onnxruntime")
    best = 0
    for k, error in enumerate(errors):
        best = k if error <= NOTICEABLE * errors[best] else best
    return found[best]


def _corrected(
    where: Place,
    refined: Refined,
    batches: Sequence[Any],
    correct_bias: bool | None,
    weights: Mapping[tuple[str, int], Array] | None = None,
) -> Chosen:
    """Correct the biases of a model with these weights in place of its own."""
    placement, other = where.placed(refined), weights or {}
    if correct_bias is False:
        return Chosen(refined, placement._replace(prepared=with_parameters(placement.prepared, other)))
    layers, how = placement.plan.weights, {"always": bool(correct_bias), "optimized": where.engine == "onnxruntime"}

    def write(floats: Prepared) -> Any:
        return where.write(placement._replace(prepared=with_parameters(floats, other)))

    prepared, corrections = correct_biases(placement.prepared, write, layers, batches, **how)
    return Chosen(refined, placement._replace(prepared=with_parameters(prepared, other)), corrections)
