"""Count a tensor into bins, on its device, as :func:`klquant.histogram` does: bit for bit the same."""

from typing import Any, TypeAlias

import numpy as np
import torch

import klquant

Counts: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"
_ON_DEVICE = ("cuda", "xpu")  # those that have float64
_CHUNKS = {"cpu": 2**16, "device": 2**24}  # entries of a temporary tensor: in the cache, or enough to be worth a launch


def largest(tensor: torch.Tensor) -> float:
    """Return max |x|; NaN if there is one, 0 for an empty tensor."""
    return float(torch.stack(tensor.aminmax()).abs().max()) if tensor.numel() else 0.0


def count(tensor: torch.Tensor, num_bins: int, amax: float) -> Counts:
    """Return the counts of a finite tensor over [-amax, amax], shape (num_bins,); values beyond are in the end bins."""
    if tensor.device.type in _ON_DEVICE:
        return count_scaled(tensor, num_bins, num_bins / amax)
    values = tensor.to("cpu", torch.promote_types(tensor.dtype, torch.float32)).numpy()
    hist: Counts = klquant.histogram(values, num_bins=num_bins, amax=amax).hist
    return hist


def count_scaled(tensor: torch.Tensor, num_bins: int, times: float, over: float = 1.0) -> Counts:
    """Return the counts of ``x * times / over`` in half bins from 0, joined to bins."""
    on_device = tensor.device.type in _ON_DEVICE
    total = torch.zeros(num_bins, dtype=torch.int64, device=tensor.device)
    for part in tensor.reshape(-1).split(_CHUNKS["device" if on_device else "cpu"]):
        half_bins = (part.double() * times / over).clamp_(-num_bins, num_bins).int()
        bins = ((half_bins.abs() + 1) // 2).clamp_(max=num_bins // 2).mul_(half_bins.sign()).add_(num_bins // 2)
        total += _count_sorted(bins, num_bins) if on_device else torch.bincount(bins, minlength=num_bins)
    counts: Counts = total.cpu().numpy()
    return counts


def _count_sorted(bins: torch.Tensor, num_bins: int) -> torch.Tensor:
    """Count by sorting, 16 bits where they do; adding the many zeros of a ReLU to one bin takes a GPU longer."""
    dtype = torch.int16 if num_bins < 2**15 else torch.int32
    ends = torch.arange(num_bins + 1, device=bins.device, dtype=dtype)
    return torch.searchsorted(bins.to(dtype).sort().values, ends).diff()
