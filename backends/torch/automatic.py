"""Try every criterion and correction on a module: one call from a float model to INT8 and its accuracy."""

import math
import time
from collections.abc import Iterable
from typing import Any, Unpack

from torch import nn

from klquant.errors import InvalidInputError

from ..accuracy.comparison import Metric, compare_models, kind_of_agreement
from ..accuracy.outputs import Outputs, count_samples
from ..accuracy.splits import Split, hold_back
from ..accuracy.trials import Recipe, Target
from ..automatic import Attempt, Automatic, Data, check_limit, try_until
from ..batches import numbered
from ..settings import CRITERIA
from .accuracy.outputs import named_outputs, num_bytes
from .accuracy.recipes import Recipes, points_of
from .model.forward import Forward, call_model, check_eval
from .model.layers import weighted_layers
from .options import SimulationOptions
from .stages import QuantizedModel, warn_of_skipped


def auto(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward = call_model,
    target: str | float = 0.99,
    metric: Metric | None = None,
    validation: Iterable[Any] | None = None,
    max_seconds: float = 240.0,
    progress: bool = True,
    **settings: Unpack[SimulationOptions],
) -> Automatic[QuantizedModel]:
    """Quantize a module by every criterion and with every step, and compare each with the float model.

    Parameters
    ----------
    model : torch.nn.Module, in eval mode
        It is not changed.
    batches : iterable
        Data to be iterated several times, such as a DataLoader.
    forward : callable (model, batch) -> output
        How to run the model on a batch.
    target : str or float
        What is accurate enough: ``"30dB"`` is the SQNR of the worst output; a number is the metric, by default the
        agreement of the worst output: top-1 of scores, the cosine of other outputs.
    metric : callable, optional
        As for :func:`compare`: the larger, the better.
    validation : iterable, optional
        Batches to measure on. By default every fourth of `batches` is held back from calibration for this; of fewer
        than four, all serve both purposes.
    max_seconds : float
        No further way is tried after this time. The first one always is.
    progress : bool
        Show bars on a terminal.
    **settings
        Of :class:`Quantizer`, and its ``engine``.

    Returns
    -------
    Automatic
        ``quantized`` is the best model, ``verdict`` a sentence about it, ``rows()`` the table of all attempts, and
        ``next_steps`` says what to do next.

    Raises
    ------
    InvalidInputError
        As :func:`quantize`; for data that can be iterated only once, and an impossible target.

    Notes
    -----
    The methods are the criteria (entropy, max, percentile, mse, auto), then equalize, smooth (where there is a
    LayerNorm), adaround and correct_bias, each on top of the best so far. With smooth the calibration fits the smoothed
    model.
    Times are not measured: the simulation says nothing about them. :func:`tune` goes on from here: it leaves out the
    layers that cost most.
    """
    end = time.perf_counter() + max_seconds
    check_eval(model)
    check_limit(max_seconds)
    wanted, split = Target.parse(target), hold_back(batches, validation)
    tried = _Ways(model, split, settings, forward, metric, progress=progress)
    tried.recipes.quantizer(Recipe("entropy"))
    attempts, best, left_out = try_until(end, tried, wanted, tried.samples, metric, progress=progress)
    quantized = tried.recipes.make(best.recipe)
    warn_of_skipped(quantized.calibration)
    found = quantized.calibration
    data = Data(found.num_batches, tried.samples, split.calibration is not split.validation)
    size = num_bytes(model)
    return Automatic(quantized, found, attempts, best, wanted, tried.measure, data, size, left_out=left_out)


class _Ways:
    """A module that can be quantized in several ways, and measured: a ``Quantizable``."""

    criteria = (*CRITERIA, "auto")
    last_steps = ()

    def __init__(
        self,
        model: nn.Module,
        split: Split,
        settings: SimulationOptions,
        forward: Forward,
        metric: Metric | None,
        *,
        progress: bool,
    ) -> None:
        self._model, self._split, self._forward, self._metric = model, split, forward, metric
        self.recipes = Recipes(model, split.calibration, settings, forward, progress=progress)
        self.steps = self.recipes.steps
        self._reference: list[Outputs] = [named_outputs(model, one, forward) for _, one in numbered(split.validation)]
        if not self._reference:
            raise InvalidInputError("expected at least one batch to measure on, got none")
        self.measure = "metric" if metric is not None else ""

    @property
    def samples(self) -> int:
        """Return the number of samples to measure on."""
        return count_samples(self._reference)

    def attempt(self, recipe: Recipe) -> Attempt:
        """Quantize the model and compare it with the float model."""
        quantized, expected = self.recipes.make(recipe), iter(self._reference)
        found = compare_models(
            (lambda batch: next(expected), lambda batch: named_outputs(quantized.model, batch, self._forward)),
            self._split.validation,
            timed=[lambda feed: None] * 2,
            sizes=(0, num_bytes(quantized.model)),
            labels=None,
            metric=self._metric,
        )
        if not self.measure:
            self.measure = kind_of_agreement(found.outputs)
        points = points_of(quantized.calibration) | {name for name, _ in weighted_layers(self._model)}
        share = len(quantized.thresholds) / max(len(points), 1)
        return Attempt.of(recipe, found._replace(float_ms=math.nan, int8_ms=math.nan), share)
