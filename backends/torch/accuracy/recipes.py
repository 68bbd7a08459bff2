"""Quantize a module by recipes: a criterion, steps and layers left out, over statistics that are collected once."""

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from klquant.errors import CalibrationWarning

from ...accuracy.trials import Recipe
from ...calibration import Calibration
from ..correction.smooth_quant import has_norms, smooth
from ..model.forward import Forward
from ..options import SimulationOptions
from ..quantizer import Quantizer
from ..stages import QuantizedModel

EQUALIZE, SMOOTH, ADAROUND, CORRECT_BIAS = "equalize", "smooth", "adaround", "correct_bias"


class Recipes:
    """A module and its calibration data. Only steps that change the weights need statistics that differ."""

    def __init__(
        self, model: nn.Module, batches: Iterable[Any], settings: SimulationOptions, forward: Forward, *, progress: bool
    ) -> None:
        self._model, self._batches, self._settings = model, batches, settings
        self._forward, self._progress = forward, progress
        self._quantizers: dict[tuple[str, ...], Quantizer] = {}
        self._smoothed: nn.Module | None = None
        self.steps = (EQUALIZE, *((SMOOTH,) if has_norms(model) else ()), ADAROUND, CORRECT_BIAS)

    def changed(self, recipe: Recipe) -> nn.Module | None:
        """Return the float model that smoothing makes, if it is a step of this recipe."""
        if SMOOTH not in recipe.steps:
            return None
        if self._smoothed is None:
            self._smoothed = smooth(self._model, self._batches, forward=self._forward)
        return self._smoothed

    def quantizer(self, recipe: Recipe) -> Quantizer:
        """Return a quantizer with the histograms of the model of a recipe."""
        key = tuple(step for step in recipe.steps if step not in (ADAROUND, CORRECT_BIAS))
        if key not in self._quantizers:
            changed = self.changed(recipe)
            model = self._model if changed is None else changed  # a module may have a length, so no `or`
            quantizer = Quantizer(model, forward=self._forward, progress=self._progress, **self._settings)
            quantizer._collect(next(iter(self._batches)), self._batches, equalize=EQUALIZE in key)
            self._quantizers[key] = quantizer
        return self._quantizers[key]

    def searched(self, recipe: Recipe) -> Quantizer:
        """Return a quantizer with the thresholds of a recipe."""
        criterion: Any = recipe.criterion
        quantizer = self.quantizer(recipe)
        quantizer.search_thresholds(criterion=criterion, batches=self._batches)
        return quantizer

    def make(self, recipe: Recipe) -> QuantizedModel:
        """Return the model of a recipe; what warnings would say is measured by the caller."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CalibrationWarning)
            quantizer = self.searched(recipe)
            quantized = quantizer.simulate(exclude=recipe.exclude)
            if ADAROUND in recipe.steps:
                quantized = quantizer.adapt_rounding(quantized, self._batches)
            if CORRECT_BIAS in recipe.steps:
                quantized = quantizer.correct_bias(quantized, self._batches)
        return quantized


def points_of(found: Calibration) -> set[str]:
    """Return the layers and operands of functions that could be in INT8."""
    return {*found.amax, *found.weight_scales}
