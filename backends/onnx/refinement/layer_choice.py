"""Choose by the outputs: whether to scale channels, how wide ranges are, and what stays in floating point.

A criterion sees one tensor. What a clipped tail or a coarse step costs in the outputs only a run shows: behind
HardSwish, for example, clipping may cost more than a histogram says.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import onnx

from ...calibration import Calibration
from ...settings import WEIGHTED
from ..accuracy.sensitivity import rank_layers
from ..correction.data import halved, read_feeds, sampled
from ..correction.output_error import output_errors
from ..engines.inspection import inspect
from ..engines.tensorrt import check_tensorrt
from ..execution import Feed
from ..lowering.padding import is_depthwise
from ..placement import Ranges
from .noise_search import open_meter
from .place import Place, Refined
from .range_choices import Base, given_base, smoothed_bases
from .work import Work, work_of

NOTICEABLE = 0.95
"""The error of the outputs must fall to this part of what it was: less may be chance."""
SCALED = 0.4
"""The same for scaled channels between convolutions: photos that were not seen have other largest values.

PP-OCRv4's text detector: 0.49 on other crops of the photos that the factors come from, 1.1 on other photos. The
recognizers: 0.05 and 0.02 on calibration data, 0.6 and 0.5 on other lines.
"""
AS_GOOD = 1.12  # times the least error: half a decibel more is no reason to leave out more layers
CLIPPING = 1.25
"""Times the noise that clipping causes is accepted without it: other data clips more than that which was measured."""
BATCHES, MEASURED, JUDGED = 4, 4, 16
"""Parts of up to so many batches are used, with so many samples in all to measure costs, and to judge what is best."""
ROUNDS = 2
WORK = 2.0  # times the share of layers is the share of multiplications that may be left out
LEAST = 0.01  # part of the noise that a layer must save
COSTLY = "in INT8 it costs more accuracy than other layers"
logger = logging.getLogger("klquant")


def refined(
    where: Place,
    ranges: Ranges,
    calibration: Calibration | Mapping[str, float],
    batches: Iterable[Any],
    min_int8: float,
) -> list[Refined]:
    """Scale channels and leave out layers, each if the error of the outputs falls by it; clip only what that helps.

    Parameters
    ----------
    where : Place
    ranges : Ranges
        To start from.
    calibration : Calibration or mapping
        Only a Calibration allows other ranges.
    batches : iterable
        Some data. Every other batch says what to change, and the rest judges; a single batch is halved. With one sample
        nothing changes.
    min_int8 : float
        Share of the layers, and of their multiplications, that stays in INT8.

    Returns
    -------
    list of Refined
        As far as they differ: the model as calibrated, the best float model and ranges with all in INT8, and these with
        some layers in floating point; then the same with pointwise functions in floating point, if they are cheap, and
        with depthwise convolutions too.
    """
    prepared, engine, asymmetric = where.prepared, where.engine, bool(ranges.candidates)
    given = given_base(prepared, ranges, calibration, engine)
    feeds = halved(prepared, list(read_feeds(prepared, batches)))
    if len(feeds) < 2:
        return [Refined(given, ranges)]
    measuring = sampled(prepared, feeds[::2], BATCHES, MEASURED)
    judging = sampled(prepared, feeds[1::2], BATCHES, JUDGED)
    others = smoothed_bases(prepared, calibration, engine, where.excluded, feeds, asymmetric=asymmetric)
    return _Refinement(where, measuring, judging, min_int8, work_of(prepared, measuring[0])).refine([given, *others])


class _Refinement(NamedTuple):
    """A model to quantize, and data to measure on."""

    where: Place
    measuring: Sequence[Feed]
    judging: Sequence[Feed]
    min_int8: float
    work: Work

    def refine(self, bases: Sequence[Base]) -> list[Refined]:
        """Choose the float model and ranges that clip or wider ones, then leave out layers, as the judging data say.

        That is done once more with the functions between layers in floating point, where they may; and there some
        depthwise convolutions are left out instead.
        """
        every = [Refined(base, ranges) for base in bases for ranges in base.choices]
        functions, found = self._functions(every[0]), self._refined(every)
        if functions:
            first, start, other = self._refined([one._replace(functions=functions) for one in every])
            depthwise = [start._replace(left_out=names) for names in self._depthwise(start)]
            model, *models = [self.where.write(self.where.placed(one)) for one in (start, *depthwise)]
            accepted = [one for one, made in zip(depthwise, models, strict=True) if self._accepts(made, model)]
            found += [first, start, other, *accepted]
        return _distinct(found)

    def _depthwise(self, start: Refined) -> list[tuple[str, ...]]:
        """Return as many depthwise convolutions as may be left out, from the start of the model or from its end.

        Between functions in floating point, that spares two quantizers each. onnxruntime computes them as fast there.
        """
        graph, skipped = self.where.prepared.graph, self.where.placed(start).plan.skipped
        layers = [node for node in graph.nodes if node.op_type in WEIGHTED]
        least = math.ceil(self.min_int8 * len(layers))
        number = len(layers) - least - len(skipped.keys() & {node.name for node in layers})
        names = [node.name for node in layers if is_depthwise(graph, node) and node.name not in skipped]
        return [tuple(names[:number]), tuple(names[-number:])] if number > 0 and names else []

    def _refined(self, group: Sequence[Refined]) -> list[Refined]:
        """Return the first, the best, and that with some layers left out.

        What costs most is measured again without what was left out: before, it hides the rest.
        """
        start = self._best([one for one in group if not one.base.convolutions])
        start = found = self._best([start, *(one for one in group if one.base.convolutions)], SCALED)
        for _ in range(ROUNDS):
            before, found = found, self._improved(found)
            if found.left_out == before.left_out:
                break
        return [group[0], start, found]

    def _functions(self, start: Refined) -> tuple[str, ...]:
        """Return the names of the nodes between layers that may stay in floating point, if that spares quantizers."""
        functions = self.work.functions if self.work.functions_are_cheap() else ()
        plans = [self.where.placed(one).plan for one in (start, start._replace(functions=functions))]
        return functions if len(plans[1].readers) < len(plans[0].readers) else ()

    def _improved(self, start: Refined) -> Refined:
        costs, mixed = self._measured(start)
        chosen = self._best([start._replace(ranges=mixed), start])
        return self._best([chosen, *(chosen._replace(left_out=names) for names in self._left_out(chosen, costs))])

    def _left_out(self, start: Refined, costs: Mapping[str, float]) -> list[tuple[str, ...]]:
        """Return the names of what to leave out: the worst one, two, four, ..., and as much as `min_int8` lets."""
        where, graph, thresholds = self.where, start.base.prepared.graph, start.ranges.thresholds
        min_work = 1 - WORK * (1 - self.min_int8)
        limits: dict[str, Any] = {"min_int8": self.min_int8, "min_work": min_work, "least": LEAST}
        limits["work"] = self.work.multiplications
        excluded = (*where.excluded, *start.floats)
        ranking = rank_layers(graph, thresholds, where.engine, excluded, costs, **limits)
        numbers = sorted({*(2**k for k in range(len(ranking).bit_length())), len(ranking)} - {0})
        every = [[name for names in ranking[:k] for name in names] for k in numbers]
        return [tuple(dict.fromkeys((*start.left_out, *names))) for names in every]

    def _measured(self, start: Refined) -> tuple[dict[str, float], Ranges]:
        """Return what each quantizer costs, and ranges that clip a tensor only where that pays."""
        given, wide = start.base.choices[0], start.base.choices[-1]
        costs, unit = self._costs(start._replace(ranges=given))
        if wide is given:
            return costs, given
        after, _ = self._costs(start._replace(ranges=wide), unit)
        wider = {name for name, cost in after.items() if cost <= CLIPPING * costs.get(name, 0.0)}
        return costs | {name: after[name] for name in wider}, given.replaced(wide, wider)

    def _costs(self, chosen: Refined, unit: list[float] | None = None) -> tuple[dict[str, float], list[float]]:
        """Return the noise that each quantizer causes, and its unit: by default the noise of all together."""
        placement = self.where.placed(chosen)
        with open_meter(placement.prepared.graph, self.where.write(placement), self.measuring, unit=unit) as meter:
            return meter.costs(), meter.unit

    def _best(self, tried: Sequence[Refined], worth: float = NOTICEABLE) -> Refined:
        """Return the first of those that are nearly as good as the best; the start, if none is worth it."""
        tried = _distinct(tried)
        if len(tried) == 1:
            return tried[0]
        models = [self.where.write(self.where.placed(one)) for one in tried]
        errors = output_errors(self.where.prepared, models, self.judging, optimized=self.where.engine == "onnxruntime")
        logger.info("errors of the outputs: %s", ", ".join(f"{error:.3f}" for error in errors))
        if min(errors) > worth:
            return tried[0]
        limit = min(min(errors) * AS_GOOD, worth)
        good = (k for k, error in enumerate(errors) if error <= limit)
        return next((tried[k] for k in good if self._accepts(models[k], models[0])), tried[0])

    def _accepts(self, model: onnx.ModelProto, start: onnx.ModelProto) -> bool:
        """Ask the engine: a node that was left out may take a layer before it out of INT8, or break a rule."""
        if self.where.engine == "onnxruntime":
            total = sum(node.op_type in WEIGHTED for node in self.where.prepared.graph.nodes)
            return _num_int8(model) >= min(self.min_int8 * total, _num_int8(start))
        return self.where.engine != "tensorrt" or not check_tensorrt(model)


def _distinct(tried: Sequence[Refined]) -> list[Refined]:
    keys = [one.key() for one in tried]
    return [one for k, one in enumerate(tried) if keys[k] not in keys[:k]]


def _num_int8(model: onnx.ModelProto) -> int:
    return sum(node.int8 for node in inspect(model, "onnxruntime") if node.op_type in WEIGHTED)
