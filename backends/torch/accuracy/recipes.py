"""Quantize a module by recipes: a criterion, steps and layers left out, over statistics that are collected once."""

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from klquant.errors import CalibrationWarning

from ...accuracy.trials import Recipe
from ...settings import SettingsOptions
from ..model.forward import Forward
from ..quantizer import Quantizer
from ..stages import QuantizedModel

EQUALIZE, CORRECT_BIAS = "equalize", "correct_bias"


class Recipes:
    """A module and its calibration data. Only equalization needs statistics that differ."""

    def __init__(
        self, model: nn.Module, batches: Iterable[Any], settings: SettingsOptions, forward: Forward, *, progress: bool
    ) -> None:
        self._model, self._batches, self._settings = model, batches, settings
        self._forward, self._progress = forward, progress
        self._quantizers: dict[bool, Quantizer] = {}

    def quantizer(self, *, equalize: bool = False) -> Quantizer:
        """Return a quantizer with the histograms of the model."""
        if equalize not in self._quantizers:
            quantizer = Quantizer(self._model, forward=self._forward, progress=self._progress, **self._settings)
            quantizer._collect(next(iter(self._batches)), self._batches, equalize=equalize)
            self._quantizers[equalize] = quantizer
        return self._quantizers[equalize]

    def searched(self, recipe: Recipe) -> Quantizer:
        """Return a quantizer with the thresholds of a recipe."""
        criterion: Any = recipe.criterion
        quantizer = self.quantizer(equalize=EQUALIZE in recipe.steps)
        quantizer.search_thresholds(criterion=criterion, batches=self._batches)
        return quantizer

    def make(self, recipe: Recipe) -> QuantizedModel:
        """Return the model of a recipe; what warnings would say is measured by the caller."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CalibrationWarning)
            quantizer = self.searched(recipe)
            quantized = quantizer.simulate(exclude=recipe.exclude)
            if CORRECT_BIAS in recipe.steps:
                quantized = quantizer.correct_bias(quantized, self._batches)
        return quantized
