"""The two passes over the calibration data as functions: the range of every observed tensor, then its histogram."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

import klquant
from klquant.errors import InvalidInputError

from ...collection import Run, capped, collect_counts, collect_ranges, histograms_of
from ...settings import Settings
from ..model.forward import Forward, Where, call_model, check_eval
from .observer import TorchObserver


def collect_amax(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    observe: Where = "inputs",
    max_amax: float | None = None,
    forward: Forward = call_model,
    progress: bool = True,
) -> dict[str, float]:
    """Pass 1: find the largest absolute value of every observed tensor.

    Parameters
    ----------
    model : torch.nn.Module, in eval mode
    batches : iterable
        Tensors, tuples or mappings of tensors, of any batch size.
    observe : {"inputs", "outputs"}, or a mapping of layer names to these
        Whether to look at what enters each quantized layer, or at what leaves it (after its folded ReLU). Of a
        mapping, layers that it lacks are not observed.
    max_amax : float, optional
        Larger values are capped to this.
    forward : callable (model, batch) -> output
        How to run the model on a batch.
    progress : bool
        Show a bar on a terminal or in a notebook.

    Returns
    -------
    dict
        amax by qualified layer name, in units of the activation; layers that were never called are missing.

    Raises
    ------
    InvalidInputError
        For NaN or infinity (named with layer and batch), no batches, a model in training mode.
    ModelError
        If the model fails on a batch; its own error is the cause.
    """
    check_eval(model)
    if max_amax is not None and not max_amax > 0:
        raise InvalidInputError(f"`max_amax` must be positive, got {max_amax}")
    found = collect_ranges(TorchObserver(model, observe, forward), batches, run=Run(progress))
    return capped(found.amax, max_amax)


def collect_histograms(
    model: nn.Module,
    batches: Iterable[Any],
    amax: Mapping[str, float],
    *,
    observe: Where = "inputs",
    num_bins: int = 4001,
    max_amax: float | None = None,
    forward: Forward = call_model,
    progress: bool = True,
) -> dict[str, klquant.Histogram]:
    """Pass 2: count every observed tensor into bins over [-amax, amax].

    Parameters
    ----------
    model, batches, observe, max_amax, forward, progress
        As for :func:`collect_amax`, with the same data.
    amax : mapping
        The result of pass 1.
    num_bins : int, odd

    Returns
    -------
    dict
        A Histogram of NumPy arrays by qualified layer name; tensors that are always 0 have none.

    Raises
    ------
    InvalidInputError
        If the data are not those of pass 1: a layer without amax, or values beyond it.
    ModelError
        If the model fails on a batch.
    """
    check_eval(model)
    settings = Settings(num_bins=num_bins, max_amax=max_amax)
    found = collect_counts(TorchObserver(model, observe, forward), batches, amax, settings, run=Run(progress))
    return {name: histogram for name, (histogram, _) in histograms_of(found).items()}
