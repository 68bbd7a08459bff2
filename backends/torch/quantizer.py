"""All stages in their order: the class that knows which one a model has reached, and the call that does them all."""

import logging
import warnings
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import nn

import klquant
from klquant.errors import CalibrationWarning, InvalidInputError, StageError

from .calibration import Criterion, LayerThreshold, search_thresholds
from .folding import Fold, fold_batch_norm, fold_relu
from .layers import skipped_layers
from .observing import MAX_AMAX, collect_amax, collect_histograms
from .running import Forward, Observe, call_model, check_eval, check_observe
from .simulation import quantize_weights, simulate

logger = logging.getLogger("klquant")


class Stage(IntEnum):
    """What has been done to a model."""

    LOADED = 0
    FOLDED = 1
    WEIGHTS_QUANTIZED = 2
    AMAX_COLLECTED = 3
    HISTOGRAMS_COLLECTED = 4
    CALIBRATED = 5


_HOW_TO_REACH = {
    Stage.FOLDED: "fold(batch)",
    Stage.WEIGHTS_QUANTIZED: "quantize_weights()",
    Stage.AMAX_COLLECTED: "collect_amax(batches)",
    Stage.HISTOGRAMS_COLLECTED: "collect_histograms(batches)",
    Stage.CALIBRATED: "search_thresholds()",
}


class Quantized(NamedTuple):
    """The result of :func:`quantize`."""

    model: nn.Module
    """Simulates INT8 inference; use it like the model it came from."""
    thresholds: dict[str, LayerThreshold]
    """amax, T, divergence and clipped share of each layer, by qualified name."""
    weight_scales: dict[str, torch.Tensor]
    """Scale per output channel of each layer's weights."""
    histograms: dict[str, klquant.Histogram]
    """What was observed, with the zeros."""
    folds: list[Fold]
    """What became of each BatchNorm and ReLU."""


class Quantizer:
    """Take a model through the stages of calibration, one call each, in this order.

    ``fold``, ``quantize_weights``, ``collect_amax``, ``collect_histograms``, ``search_thresholds``, ``simulate``.
    A call before its turn raises a StageError that names the missing one; repeating a stage discards the later
    ones. All work is done on copies: the model that is given never changes.

    Parameters
    ----------
    model : torch.nn.Module, in eval mode
    observe : {"inputs", "outputs"}
        Quantize what enters each layer, as engines do, or what leaves each (folded) layer.
    num_bins : int, odd
        Histogram bins per tensor.
    max_amax : float
        Cap on the observed range, against absurd outliers.
    forward : callable (model, batch) -> output
        How to run the model on a batch; by default tensors are passed as they are, tuples and lists as
        positional arguments, mappings as keyword arguments.
    progress : bool
        Show bars on a terminal.

    Attributes
    ----------
    stage : Stage
        What has been done.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        observe: Observe = "inputs",
        num_bins: int = 4001,
        max_amax: float = MAX_AMAX,
        forward: Forward = call_model,
        progress: bool = False,
    ) -> None:
        check_observe(observe)
        check_eval(model)
        if num_bins % 2 == 0 or num_bins < 255:
            raise InvalidInputError(f"`num_bins` must be odd and at least 255, got {num_bins}")
        self.stage = Stage.LOADED
        self._model = model
        self._observe = observe
        self._num_bins = num_bins
        self._max_amax = max_amax
        self._forward = forward
        self._progress = progress

    def fold(self, batch: Any) -> list[Fold]:
        """Fold BatchNorm and ReLU into the layers that feed them, as one run on `batch` shows."""
        self._folded, norms = fold_batch_norm(self._model, batch, forward=self._forward)
        self._folded, relus = fold_relu(self._folded, batch, forward=self._forward)
        self._folds = norms + relus
        self._reached(Stage.FOLDED)
        return self._folds

    def quantize_weights(self) -> dict[str, torch.Tensor]:
        """Find the scale of each output channel of each layer's weights."""
        self._need(Stage.FOLDED)
        self._weight_scales = quantize_weights(self._folded)
        self._reached(Stage.WEIGHTS_QUANTIZED)
        return self._weight_scales

    def collect_amax(self, batches: Iterable[Any]) -> dict[str, float]:
        """Pass 1: the range of every observed tensor. The weights are still in floating point, as on an engine."""
        self._need(Stage.WEIGHTS_QUANTIZED)
        self._amax = collect_amax(self._folded, batches, max_amax=self._max_amax, **self._options())
        self._reached(Stage.AMAX_COLLECTED)
        return self._amax

    def collect_histograms(self, batches: Iterable[Any]) -> dict[str, klquant.Histogram]:
        """Pass 2 over the same data: the histogram of every observed tensor."""
        self._need(Stage.AMAX_COLLECTED)
        self._histograms = collect_histograms(
            self._folded, batches, self._amax, num_bins=self._num_bins, max_amax=self._max_amax, **self._options()
        )
        self._reached(Stage.HISTOGRAMS_COLLECTED)
        return self._histograms

    def search_thresholds(self, *, criterion: Criterion = "entropy") -> dict[str, LayerThreshold]:
        """Choose T for every observed tensor; may be called again with another criterion."""
        self._need(Stage.HISTOGRAMS_COLLECTED)
        self._thresholds = search_thresholds(self._amax, self._histograms, criterion=criterion)
        self._reached(Stage.CALIBRATED)
        return self._thresholds

    def simulate(self) -> Quantized:
        """Return a model that simulates INT8 inference, with all that was found on the way."""
        self._need(Stage.CALIBRATED)
        for name, reason in self._left_alone().items():
            warnings.warn(f"layer `{name}` stays in floating point: {reason}", CalibrationWarning, stacklevel=2)
        model = simulate(self._folded, self._weight_scales, self._thresholds, observe=self._observe)
        return Quantized(model, self._thresholds, self._weight_scales, self._histograms, self._folds)

    def _left_alone(self) -> dict[str, str]:
        uncalled = {name: "it was never called" for name in self._weight_scales if name not in self._thresholds}
        left = {**skipped_layers(self._folded), **uncalled}
        return left if left or self._thresholds else {"": "the model has no layer that can be quantized"}

    def _options(self) -> dict[str, Any]:
        return {"observe": self._observe, "forward": self._forward, "progress": self._progress}

    def _need(self, stage: Stage) -> None:
        if self.stage < stage:
            missing = Stage(self.stage + 1)
            raise StageError(
                f"expected stage {stage.name}, got a model at stage {self.stage.name}; "
                f"call {_HOW_TO_REACH[missing]} first"
            )

    def _reached(self, stage: Stage) -> None:
        self.stage = stage
        logger.info("stage %s reached", stage.name)


def quantize(
    model: nn.Module, batches: Iterable[Any], *, criterion: Criterion = "entropy", **options: Any
) -> Quantized:
    """Calibrate a model on data and return it as INT8 inference would compute it.

    Parameters
    ----------
    model : torch.nn.Module, in eval mode
        It is not changed.
    batches : re-iterable
        Calibration data, gone through twice: a list of batches, a DataLoader, ...
    criterion : {"entropy", "max", "percentile", "mse"}
        How T is chosen, see :func:`search_thresholds`.
    **options
        Those of :class:`Quantizer`.

    Returns
    -------
    Quantized
        `model` simulates INT8; `thresholds`, `weight_scales`, `histograms` and `folds` tell what was found.

    Raises
    ------
    InvalidInputError
        For a generator or iterator (it can be gone through only once), no batches, NaN or infinity in an
        activation (naming layer and batch), a model in training mode.
    """
    if isinstance(batches, Iterator):
        raise InvalidInputError(
            f"`batches` must be an iterable that can be gone through twice, got the one-shot {type(batches).__name__}; "
            "pass a list or a DataLoader"
        )
    quantizer = Quantizer(model, **options)
    quantizer.fold(_first(batches))
    quantizer.quantize_weights()
    quantizer.collect_amax(batches)
    quantizer.collect_histograms(batches)
    quantizer.search_thresholds(criterion=criterion)
    return quantizer.simulate()


def _first(batches: Iterable[Any]) -> Any:
    for batch in batches:
        return batch
    raise InvalidInputError("expected at least one calibration batch, got none")
