"""What a pass over the data collects, as data: a monoid of maxima and int64 sums.

Batches, processes and the two halves of an interrupted run are all joined by :func:`join`, which is exact,
associative and commutative: neither the split of the data nor their order shows.

With one pass the range is not known before the counts. There a histogram of level k lies over [-3**k, 3**k]; when a
larger value comes its bins are merged three by three, which keeps an odd number of bins aligned. There are three times
as many bins as asked for: in the end the empty ones outside are cut off, two thirds of them at most.
"""

from collections.abc import Mapping

import torch

import klquant
from klquant.errors import InvalidInputError

from ...collection import _DRIFT, Counts, Statistics, _add, _finite, _level_of, _sum, at_level


def observe_range(batch: Statistics, name: str, tensor: torch.Tensor) -> None:
    """Pass 1: take the range of one tensor."""
    amax = _finite(largest(tensor))
    batch.amax[name] = max(batch.amax.get(name, 0.0), amax)
    batch.calls[name] = batch.calls.get(name, 0) + 1


def observe_histogram(
    batch: Statistics, name: str, tensor: torch.Tensor, *, amax: Mapping[str, float], num_bins: int, max_amax: float
) -> None:
    """Pass 2: count one tensor over the range found in pass 1."""
    if name not in amax:
        raise InvalidInputError("expected the data of pass 1, got a layer that was not called there")
    found = _finite(largest(tensor))
    if found > _DRIFT * amax[name] and amax[name] < max_amax:
        raise InvalidInputError(f"expected the data of pass 1 with amax = {amax[name]}, got a value of {found}")
    if amax[name] > 0:
        _add(batch, name, count(tensor, num_bins, amax[name]))


def observe_growing(batch: Statistics, name: str, tensor: torch.Tensor, *, num_bins: int, max_amax: float) -> None:
    """Count one tensor in the only pass, over a range that is wide enough for it."""
    observe_range(batch, name, tensor)
    amax = min(batch.amax[name], max_amax)
    if amax == 0:
        return
    level = _level_of(amax)
    counts = count_scaled(tensor.float(), num_bins, num_bins * 3.0 ** max(-level, 0), 3.0 ** max(level, 0))
    grown = [at_level(batch, name, level)] if name in batch.hist else []
    batch.hist[name], batch.level[name] = _sum([counts, *grown]), level


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
