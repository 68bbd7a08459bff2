"""From a model and data, or a model and a saved calibration, to a quantized model: all stages in one call."""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from torch import nn

from klquant.errors import InvalidInputError

from ..calibration import Calibration
from ..settings import Criterion, CriterionOrAuto
from .quantizer import Quantizer
from .stages import QuantizedModel


def quantize(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    criterion: CriterionOrAuto = "entropy",
    equalize: bool = False,
    correct_bias: bool = False,
    **options: Any,
) -> QuantizedModel:
    """Calibrate a model on data and return it as INT8 inference would compute it.

    Parameters
    ----------
    model : torch.nn.Module, in eval mode
        It is not changed.
    batches : iterable
        Calibration data: a list of batches, a DataLoader, ... It is gone through twice (once more for ``"auto"`` and
        for `correct_bias`); a one-shot stream needs ``passes=1``.
    criterion : {"entropy", "max", "percentile", "mse", "auto"}
        How T is chosen, see :func:`search_thresholds`; "auto" takes for each tensor the one with the least error of
        its layer's output.
    equalize : bool
        First equalize the ranges of neighbouring layers, for channels of very different sizes.
    correct_bias : bool
        Last correct the biases for the mean error of rounding.
    **options
        Those of :class:`Quantizer`.

    Returns
    -------
    QuantizedModel
        `model` simulates INT8; `thresholds`, `weight_scales`, `histograms`, `folds` and `skipped` tell what was found;
        ``calibration.save(path)`` keeps it for :func:`requantize`.

    Raises
    ------
    InvalidInputError
        For a generator or iterator with ``passes=2`` (it can be gone through only once), no batches, NaN or infinity
        in an activation (naming layer and batch), a model in training mode.
    ModelError
        If the model fails on a batch, naming batch and layer.

    Warns
    -----
    CalibrationWarning
        Naming them, for layers that stay in floating point without having been excluded, and for the thresholds that
        :func:`search_thresholds` warns of.
    """
    quantizer = Quantizer(model, **options)
    one_pass = options.get("passes", 2) == 1
    if isinstance(batches, Iterator):
        _check_one_shot(batches, one_pass and criterion != "auto" and not correct_bias)
    first, batches = _look_ahead(batches)
    quantizer.fold(first)
    if equalize:
        quantizer.equalize(first)
    quantizer.quantize_weights()
    if not one_pass:
        quantizer.collect_amax(batches)
    quantizer.collect_histograms(batches)
    quantizer.search_thresholds(criterion=criterion, batches=None if first is None else batches)
    if not correct_bias:
        return quantizer._simulate_in_place()
    quantized = quantizer.simulate()  # a copy: the correction compares it with the folded model
    quantizer._correct_in_place(quantized.model, batches)
    return quantized


def requantize(
    model: nn.Module, calibration: Calibration, *, criterion: Criterion | None = None, num_bits: int | None = None
) -> QuantizedModel:
    """Quantize a model by a saved calibration of it, without data; with another criterion or number of bits if wanted.

    Parameters
    ----------
    model : torch.nn.Module, in eval mode
        The model that was calibrated, with the same weights.
    calibration : Calibration
        As from ``Calibration.load(path)``.
    criterion : {"entropy", "max", "percentile", "mse"}, optional
        By default the thresholds are those of the calibration.
    num_bits : int, optional
        By default as calibrated.

    Returns
    -------
    QuantizedModel

    Raises
    ------
    InvalidInputError
        If the calibration is of another model, naming the layers that differ.

    Warns
    -----
    CalibrationWarning
        As for :func:`quantize`.
    """
    quantizer = Quantizer.from_calibration(model, calibration)
    if criterion is not None or num_bits is not None or not calibration.thresholds:
        quantizer.search_thresholds(criterion=criterion or "entropy", num_bits=num_bits)
    return quantizer._simulate_in_place()


def _check_one_shot(batches: Iterator[Any], allowed: bool) -> None:
    if not allowed:
        raise InvalidInputError(
            f"`batches` must be an iterable that can be gone through twice, got the one-shot {type(batches).__name__}; "
            "pass a list or a DataLoader, or passes=1 with another criterion than 'auto' and without correct_bias"
        )


def _look_ahead(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """Return the first batch, or None, and all of them."""
    if isinstance(batches, Iterator):
        first = next(batches, None)
        return first, chain([] if first is None else [first], batches)
    return next(iter(batches), None), batches
