"""Count a tensor on its device, bit for bit as :func:`klquant.histogram` counts on the host."""

import math

import torch

from ...collection import Bins, Counted
from ...collection import count as count_on_host
from .host_counting import Buffers, Looked, can_count, look_on_threads
from .parts import as_stored, parts

_ON_DEVICE = ("cuda", "xpu")  # those that have float64
_CHUNK = 2**24  # values that float32 still counts exactly, and enough to be worth a kernel launch
_PART = 2**17  # values that are copied to find their extremes, where they are not dense


def extremes(tensor: torch.Tensor) -> tuple[float, float]:
    """Return the smallest and the largest value; NaN if there is one, an empty range for none."""
    if not tensor.numel():
        return math.inf, -math.inf
    stored = as_stored(tensor)
    views = [stored] if is_on_device(tensor) or stored.is_contiguous() else parts(stored, _PART)
    low, high = torch.stack([bound for view in views for bound in view.aminmax()]).aminmax()
    return low.item(), high.item()


def is_on_device(tensor: torch.Tensor) -> bool:
    """Return whether the values are counted where they are."""
    return tensor.device.type in _ON_DEVICE


def count(tensor: torch.Tensor, bins: Bins) -> Counted:
    """Return the counts of a finite tensor, shape (num_bins,); values beyond the range are in the end bins."""
    if is_on_device(tensor):
        counts = count_on_device(tensor, bins).cpu()
        return Counted(counts[:-2].numpy(), int(counts[-2]))
    return look_on_host(tensor, bins, Buffers()).counted


def look_on_host(tensor: torch.Tensor, bins: Bins, buffers: Buffers) -> Looked:
    """Return what :func:`extremes` and :func:`count` return."""
    if can_count(tensor, bins):
        return look_on_threads(tensor, bins, buffers)
    wide = tensor.to("cpu", torch.promote_types(tensor.dtype, torch.float32))
    return Looked(*extremes(tensor), count_on_host(wide.numpy(), bins))


def extremes_on_device(tensor: torch.Tensor) -> torch.Tensor:
    """Return what :func:`extremes` returns, float64 of shape (2,), without waiting for the device."""
    if not tensor.numel():
        return torch.tensor([math.inf, -math.inf], dtype=torch.float64, device=tensor.device)
    return torch.stack(tensor.aminmax()).double()


def count_on_device(tensor: torch.Tensor, bins: Bins) -> torch.Tensor:
    """Return the counts, the number of zeros and that of values beyond the range, int64 of shape (num_bins + 2,).

    Half bins from 0 are joined to bins. ``histc`` adds up ones in float32, which is exact within a chunk. Nothing waits
    for the device.
    """
    tensor = (tensor if bins.level is None else tensor.float()).reshape(-1)
    num_bins, (times, over) = bins.num_bins, bins.half_bins
    total, others = (torch.zeros(length, dtype=torch.int64, device=tensor.device) for length in (num_bins, 2))
    for part in tensor.split(_CHUNK):
        wide = part.double()
        others += torch.stack([(wide == 0).sum(), (wide.abs() > bins.amax).sum()])
        half_bins = (wide * times / over).clamp_(-num_bins, num_bins).int()
        numbers = ((half_bins.abs() + 1) // 2).clamp_(max=num_bins // 2).mul_(half_bins.sign()).add_(num_bins // 2)
        total += torch.histc(numbers.float(), num_bins, -0.5, num_bins - 0.5).long()
    return torch.cat([total, others])
