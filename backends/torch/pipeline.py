"""All stages in one call: from a model and data, or a saved calibration, to a quantized model."""

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any, Unpack

from torch import nn

from klquant.errors import InvalidInputError

from ..batches import check_repeatable, first_batches
from ..calibration import Calibration
from ..settings import CRITERIA, Criterion, CriterionOrAuto, check_choice
from .model.forward import Forward, call_model
from .model.plain import LayerTypes
from .options import QuantizerOptions
from .quantizer import Quantizer
from .stages import QuantizedModel


def quantize(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    criterion: CriterionOrAuto = "entropy",
    equalize: bool = False,
    adaround: bool = False,
    correct_bias: bool = False,
    num_batches: int | None = None,
    **options: Unpack[QuantizerOptions],
) -> QuantizedModel:
    """Calibrate a model on data and return a simulation of its INT8 inference.

    Parameters
    ----------
    model : torch.nn.Module, in eval mode
        It is not changed.
    batches : iterable
        Calibration data: a list of batches, a DataLoader, ... It is iterated twice, and once more each for ``"auto"``,
        `adaround` and `correct_bias`. An iterator or generator needs ``passes=1``. A batch is a tensor, a tuple or list
        (positional arguments), or a mapping (keyword arguments). What the model does not take, such as labels, is left
        out.
    criterion : {"entropy", "max", "percentile", "mse", "auto"}
        How T is chosen, see :func:`search_thresholds`. "auto" takes the best one for each tensor: with the least error
        of its layer's output on the first 8 batches.
    equalize : bool
        Start by equalizing the ranges of neighbouring layers. It helps if channels have very different ranges.
    adaround : bool
        Round weights up or down so that the outputs of their layer on the first 8 batches change least, instead of to
        the nearest level (after Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, 2020; by
        turning over one weight after the other). :func:`requantize` cannot repeat it.
    correct_bias : bool
        End by correcting the biases for the mean rounding error.
    num_batches : int, optional
        Use only so many batches of the data.
    **options
        Those of :class:`Quantizer`.

    Returns
    -------
    QuantizedModel
        `model` simulates INT8. `thresholds`, `weight_scales`, `histograms`, `folds` and `skipped` say what was found,
        and ``calibration.save(path)`` saves it for :func:`requantize`.

    Raises
    ------
    InvalidInputError
        For an iterator or generator with ``passes=2``, no batches, NaN or infinity in an activation (naming layer and
        batch), a model in training mode, TorchScript, a model without layers to quantize or that is quantized already.
    ModelError
        If the model fails on a batch, naming batch and layer.

    Warns
    -----
    CalibrationWarning
        For layers that stay in floating point although they are not excluded, and as :func:`search_thresholds` does;
        naming the layers.

    Notes
    -----
    Memory: one copy of the model, and a second one with ``criterion="auto"``, `adaround` or `correct_bias`: they
    compare the rounded weights with those before rounding. `adaround` takes up to 1 GB more.
    """
    check_choice("criterion", criterion, (*CRITERIA, "auto"), "criteria")  # before the data are read
    quantizer, batches = Quantizer(model, **options), first_batches(batches, num_batches)
    one_pass = options.get("passes", 2) == 1
    more = {"criterion='auto'": criterion == "auto", "adaround": adaround, "correct_bias": correct_bias}
    if not one_pass or any(more.values()):
        check_repeatable(batches, f"pass a list or a DataLoader, or passes=1 without {', '.join(more)}")
    first, batches = _look_ahead(batches)
    quantizer._collect(first, batches, equalize=equalize)
    quantizer.search_thresholds(criterion=criterion, batches=None if first is None else batches)
    if not (adaround or correct_bias):
        return quantizer._simulate_in_place()
    quantized = quantizer.simulate()  # a copy: both compare it with the folded model
    if adaround:
        quantizer._round_in_place(quantized.model, batches)
    if correct_bias:
        quantizer._correct_in_place(quantized.model, batches)
    return quantized


def requantize(
    model: nn.Module,
    calibration: Calibration,
    *,
    criterion: Criterion | None = None,
    num_bits: int | None = None,
    guard: bool | None = None,
    layer_types: LayerTypes | None = None,
    forward: Forward = call_model,
) -> QuantizedModel:
    """Quantize a model by its saved calibration, without data; the criterion and the number of bits may change.

    Parameters
    ----------
    model : torch.nn.Module, in eval mode
        The model that was calibrated, with the same weights.
    calibration : Calibration
        As from ``Calibration.load(path)``.
    criterion : {"entropy", "max", "percentile", "mse"}, optional
        How T is chosen; by default the thresholds of the calibration stay.
    num_bits : int, optional
        By default as in the calibration.
    guard : bool, optional
        Whether entropy gives way to a better criterion where it clips too much. By default as in the calibration. False
        also undoes what the guard changed there.
    layer_types : mapping, optional
        That of the calibration; see :class:`Quantizer`.
    forward : callable (model, batch) -> output
        How to run the model on a batch, for :func:`export_onnx`. No batch is needed here.

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
    quantizer = Quantizer.from_calibration(model, calibration, forward=forward, layer_types=layer_types)
    guarded = any(found.replaced for found in calibration.thresholds.values())
    if criterion is not None or num_bits is not None or not calibration.thresholds or (guarded and guard is False):
        quantizer.search_thresholds(criterion=criterion or "entropy", num_bits=num_bits, guard=guard)
    return quantizer._simulate_in_place()


def _look_ahead(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """Return the first batch, None if there is none, and an iterable of all batches."""
    start = list(islice(batches, 1))
    if any(batch is None for batch in start):
        raise InvalidInputError("batch 0: expected what the model takes, such as a tensor, a tuple or a dict, got None")
    return next(iter(start), None), chain(start, batches) if isinstance(batches, Iterator) else batches
