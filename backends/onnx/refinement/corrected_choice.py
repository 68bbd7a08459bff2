"""Correct biases, and judge by it whether what was left out or widened before is still worth it."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ...rounding import MAX_BATCHES
from ...warning import quiet
from ..correction.adaround import adapt_rounding
from ..correction.alignment import aligned
from ..correction.bias_correction import correct_biases
from ..correction.data import halved, read_feeds, sampled, spread
from ..correction.output_error import output_errors
from ..correction.parameters import with_parameters
from ..execution import Feed
from ..feeds import Array
from ..model.preparation import Prepared
from ..placement import Placement
from .layer_choice import NOTICEABLE
from .place import Place, Refined

WORTH_TIME = 0.85
"""More in floating point takes time: the error of the outputs must fall to this part of what it was."""
BATCHES, JUDGED = 8, 32
"""Parts of up to so many batches, with so many samples in all, judge, and say by what channels are shifted."""
logger = logging.getLogger("klquant")


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
    adaround: bool | None = False,
) -> Chosen:
    """Shift channels and correct the biases of each; return the first, or a later one with less error of the outputs.

    Bias correction may remove noise for which layers were left out or channels scaled, and other ranges may leave less
    to correct. Then the weights of that one are rounded for the least error of their layers, and its biases corrected
    anew: always or never as `adaround` says, by default unless the nearest level leaves less error of the outputs.
    """
    some = list(batches)
    feeds = list(read_feeds(where.prepared, some))
    aligning = [] if correct_bias is False else sampled(where.prepared, feeds, BATCHES, JUDGED)
    corrector = _Corrector(where, some, correct_bias, aligning)
    with quiet():
        best = _best(where, [corrector.corrected(one) for one in tried], feeds)
        if adaround is False:
            return best
        placed = where.placed(best.refined)
        layers = placed.plan.weights
        rounded = adapt_rounding(placed.prepared, where.write(placed), layers, spread(feeds, MAX_BATCHES))
        found = corrector.corrected(best.refined, rounded)
        return found if adaround else _best(where, [found, best], feeds)


def _best(where: Place, found: Sequence[Chosen], feeds: list[dict[str, Array]]) -> Chosen:
    """Return the first, or a later one that lowers the error of the outputs on every other batch."""
    others = [] if len(found) == 1 else halved(where.prepared, feeds)[1::2]
    if not others:
        return found[0]
    judging, models = sampled(where.prepared, others, BATCHES, JUDGED), [where.write(one.placement) for one in found]
    errors = output_errors(where.prepared, models, judging, optimized=where.engine == "onnxruntime")
    logger.info("errors of the outputs with corrected biases: %s", ", ".join(f"{error:.3f}" for error in errors))
    best = 0
    for k, error in enumerate(errors):
        slower = len(found[k].refined.floats) > len(found[best].refined.floats)
        best = k if error <= (WORTH_TIME if slower else NOTICEABLE) * errors[best] else best
    return found[best]


class _Corrector(NamedTuple):
    """How to correct biases, and the data for it."""

    where: Place
    batches: Sequence[Any]
    correct_bias: bool | None
    aligning: Sequence[Feed]
    """Parts of the batches, by which channels are shifted."""

    def corrected(self, refined: Refined, weights: Mapping[tuple[str, int], Array] | None = None) -> Chosen:
        """Shift channels and correct the biases of a model with these weights in place of its own."""
        where, other = self.where, weights or {}
        placement = where.placed(refined)
        if self.correct_bias is False:
            return Chosen(refined, placement._replace(prepared=with_parameters(placement.prepared, other)))
        placement = aligned(placement, self.aligning)
        layers, optimized = placement.plan.weights, where.engine == "onnxruntime"
        how = {"always": bool(self.correct_bias), "optimized": optimized}

        def write(floats: Prepared) -> Any:
            return where.write(placement._replace(prepared=with_parameters(floats, other)))

        prepared, corrections = correct_biases(placement.prepared, write, layers, self.batches, **how)
        return Chosen(refined, placement._replace(prepared=with_parameters(prepared, other)), corrections)
