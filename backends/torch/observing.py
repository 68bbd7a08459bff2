"""The two passes over the calibration data: the range of every observed tensor, then its histogram."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

import klquant
from klquant.errors import InvalidInputError

from .running import Forward, Observe, call_model, run_observed

MAX_AMAX = 204800.0  # against absurd outliers
_DRIFT = 1.01  # float kernels may round differently from pass to pass; different data exceed this


def collect_amax(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    observe: Observe = "inputs",
    max_amax: float = MAX_AMAX,
    forward: Forward = call_model,
    progress: bool = False,
) -> dict[str, float]:
    """Pass 1: find the largest absolute value of every observed tensor.

    Parameters
    ----------
    model : torch.nn.Module, in eval mode
    batches : iterable
        Tensors, tuples or mappings of tensors, of any batch size.
    observe : {"inputs", "outputs"}
        Whether to look at what enters each quantized layer, or at what leaves it (after its folded ReLU).
    max_amax : float
        Larger values are capped to this.
    forward : callable (model, batch) -> output
        How to run the model on a batch.
    progress : bool
        Show a bar on a terminal.

    Returns
    -------
    dict
        amax by qualified layer name, in units of the activation; layers that were never called are missing.

    Raises
    ------
    InvalidInputError
        For NaN or infinity (named with layer and batch), no batches, a model in training mode.
    """
    if not max_amax > 0:
        raise InvalidInputError(f"`max_amax` must be positive, got {max_amax}")
    found: dict[str, float] = {}

    def observer(name: str, tensor: torch.Tensor) -> None:
        amax = _largest(tensor)
        if not amax < float("inf"):
            raise InvalidInputError(f"activations must be finite, got {amax}")
        found[name] = max(found.get(name, 0.0), amax)

    run_observed(
        model, batches, observer, observe=observe, forward=forward, progress="pass 1: ranges" if progress else ""
    )
    return {name: min(amax, max_amax) for name, amax in found.items()}


def collect_histograms(
    model: nn.Module,
    batches: Iterable[Any],
    amax: Mapping[str, float],
    *,
    observe: Observe = "inputs",
    num_bins: int = 4001,
    max_amax: float = MAX_AMAX,
    forward: Forward = call_model,
    progress: bool = False,
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
    """
    histograms: dict[str, klquant.Histogram] = {}

    def observer(name: str, tensor: torch.Tensor) -> None:
        if name not in amax:
            raise InvalidInputError("expected the data of pass 1, got a layer that was not called there")
        largest = _largest(tensor)
        if largest > _DRIFT * amax[name] and amax[name] < max_amax:
            raise InvalidInputError(f"expected the data of pass 1 with amax = {amax[name]}, got a value of {largest}")
        if amax[name] == 0:
            return
        values = tensor.to("cpu", torch.promote_types(tensor.dtype, torch.float32)).numpy()
        counted = klquant.histogram(values, num_bins=num_bins, amax=amax[name])
        histograms[name] = klquant.merge(histograms[name], counted) if name in histograms else counted

    run_observed(
        model, batches, observer, observe=observe, forward=forward, progress="pass 2: histograms" if progress else ""
    )
    return histograms


def _largest(tensor: torch.Tensor) -> float:
    """Return max |x|; NaN if there is one, 0 for an empty tensor."""
    return float(torch.stack(tensor.aminmax()).abs().max()) if tensor.numel() else 0.0
