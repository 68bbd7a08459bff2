"""Tune a module in the simulation of INT8."""

import hashlib
import math
import warnings
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from klquant.errors import CalibrationWarning, InvalidInputError

from ...accuracy.comparison import Metric, score_outputs
from ...accuracy.outputs import Outputs
from ...accuracy.splits import Split, hold_back
from ...accuracy.trial_log import TrialLog
from ...accuracy.trials import Measured, Recipe, Target, Tuned
from ...accuracy.tuning import split_options
from ...accuracy.tuning import tune as tune_shared
from ...batches import progress_bar
from ...settings import CRITERIA
from ..model.dataflow import tensors_in
from ..model.forward import Forward, call_model, check_eval
from ..model.layers import fingerprint
from ..options import SimulationOptions, TorchTuningOptions
from ..stages import QuantizedModel
from .outputs import named_outputs
from .recipes import Recipes, points_of

RANKING_BATCHES = 1  # on which layers are quantized one at a time


def tune(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    target: str | float = 0.99,
    forward: Forward = call_model,
    metric: Metric | None = None,
    validation: Iterable[Any] | None = None,
    progress: bool = True,
    resume: str | Path | None = None,
    **options: Unpack[TorchTuningOptions],
) -> Tuned[QuantizedModel]:
    """Try settings, measure each simulation, and stop at the first module that reaches a target.

    Parameters
    ----------
    model : torch.nn.Module, in eval mode
        It is not changed.
    batches : iterable
        Data to be iterated several times.
    target : str or float
        ``"30dB"``: the SQNR of the worst output; or a number: the metric, by default the agreement of the worst output
        as :func:`compare` measures it.
    forward : callable (model, batch) -> output
        How to run the model on a batch.
    metric : callable, optional
        As for :func:`compare`: the larger, the better.
    validation : iterable, optional
        Batches to measure on. By default every fourth of `batches` is held back from calibration for this; of fewer
        than four, all serve both purposes.
    progress : bool
        Show a bar on a terminal or in a notebook.
    resume : path, optional
        JSON file that keeps the trials, written anew after each. If it exists, they are not made again.
    **options
        ``max_runs`` (40), the largest number of quantized models to try; ``min_int8`` (0.8), the least share of layers
        that stays in INT8; and the settings and ``engine`` of :class:`Quantizer`.

    Returns
    -------
    Tuned
        ``trace.reached`` says whether the target was reached. If not, the model is the most accurate one of all.

    Raises
    ------
    InvalidInputError
        For a target, share or number of runs that is impossible, data that can be iterated only once, a `resume` file
        of another tuning, and as :func:`quantize`.

    Notes
    -----
    The trials are the criteria, then equalization, smoothing (for models with LayerNorm) and bias correction on top of
    the best, then layers left out: those first whose rounding alone costs the outputs most on one batch, see
    :func:`diagnose`. Times are not measured: the simulation says nothing about them.
    """
    limits, settings = split_options(options)
    wanted, split = Target.parse(target), hold_back(batches, validation)
    check_eval(model)
    tuner = _TorchTuner(model, split, settings, forward, metric)
    log = TrialLog(resume, None if resume is None else tuner.identity())
    with progress_bar("tuning" if progress else "", range(limits.max_runs)) as advance:
        trace = tune_shared(tuner, wanted, limits, log, advance)
    quantized = tuner.recipes.make(trace.best.recipe)
    return Tuned(quantized, quantized.calibration, trace, tuner.recipes.changed(trace.best.recipe))


class _TorchTuner:
    """A module that can be quantized in several ways and measured: a ``Tunable``."""

    criteria = (*CRITERIA, "auto")
    last_steps = ()

    def __init__(
        self, model: nn.Module, split: Split, settings: SimulationOptions, forward: Forward, metric: Metric | None
    ) -> None:
        self._model, self._split, self._settings = model, split, settings
        self._forward, self._metric = forward, metric
        self.recipes = Recipes(model, split.calibration, settings, forward, progress=False)
        self.steps = self.recipes.steps
        self._reference: list[Outputs] = [named_outputs(model, batch, forward) for batch in split.validation]
        if not self._reference:
            raise InvalidInputError("expected at least one batch to measure on, got none")

    def measure(self, recipe: Recipe) -> Measured:
        """Quantize the model and compare it with the float model."""
        quantized = self.recipes.make(recipe)
        batches = self._split.validation
        found: list[Outputs] = [named_outputs(quantized.model, batch, self._forward) for batch in batches]
        share = len(quantized.thresholds) / max(len(points_of(quantized.calibration)), 1)
        return Measured(*score_outputs(batches, self._reference, found, self._metric), math.nan, share)

    def rank(self, recipe: Recipe, min_int8: float) -> list[tuple[str, ...]]:
        """Return the layers to leave out of INT8, what costs most first."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CalibrationWarning)
            quantizer = self.recipes.searched(recipe)
            found = quantizer.diagnose(list(islice(self._split.calibration, RANKING_BATCHES)))
        most = len(found.layers) - math.ceil(min_int8 * len(points_of(quantizer.calibration)) - 1e-9)
        return [(layer.name,) for layer in found.layers[: max(most, 0)]]

    def identity(self) -> object:
        """Return what the trials depend on."""
        digest = hashlib.sha256()
        for batch in (*self._split.calibration, *self._split.validation):
            for tensor in tensors_in(batch):
                digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        layers = sorted(fingerprint(self._model).items())
        return digest.hexdigest(), layers, sorted(map(repr, self._settings.items())), self._metric is None
