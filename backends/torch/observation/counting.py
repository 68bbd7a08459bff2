"""Count a tensor on its device, bit for bit as :func:`klquant.histogram` counts on the host."""

import math

import torch

from ...collection import Bins, Counted
from ...collection import count as count_on_host

_ON_DEVICE = ("cuda", "xpu")  # those that have float64
_CHUNK = 2**24  # values of a temporary tensor, enough to be worth a kernel launch


def extremes(tensor: torch.Tensor) -> tuple[float, float]:
    """Return the smallest and the largest value; NaN if there is one, an empty range for none."""
    if not tensor.numel():
        return math.inf, -math.inf
    low, high = torch.stack(tensor.aminmax()).tolist()
    return low, high


def count(tensor: torch.Tensor, bins: Bins) -> Counted:
    """Return the counts of a finite tensor, shape (num_bins,); values beyond the range are in the end bins."""
    if tensor.device.type in _ON_DEVICE:
        return _count_on_device(tensor if bins.level is None else tensor.float(), bins)
    values = tensor.to("cpu", torch.promote_types(tensor.dtype, torch.float32)).numpy()
    return count_on_host(values, bins)


def _count_on_device(tensor: torch.Tensor, bins: Bins) -> Counted:
    """Count half bins from 0 and join them to bins."""
    num_bins, (times, over) = bins.num_bins, bins.half_bins
    total = torch.zeros(num_bins, dtype=torch.int64, device=tensor.device)
    for part in tensor.reshape(-1).split(_CHUNK):
        half_bins = (part.double() * times / over).clamp_(-num_bins, num_bins).int()
        numbers = ((half_bins.abs() + 1) // 2).clamp_(max=num_bins // 2).mul_(half_bins.sign()).add_(num_bins // 2)
        total += _count_sorted(numbers, num_bins)
    zeros = tensor.numel() - int(tensor.count_nonzero())
    return Counted(total.cpu().numpy(), zeros)


def _count_sorted(numbers: torch.Tensor, num_bins: int) -> torch.Tensor:
    """Count by sorting, in 16 bits where they suffice: a ReLU's many zeros make atomic additions to one bin slow."""
    dtype = torch.int16 if num_bins < 2**15 else torch.int32
    ends = torch.arange(num_bins + 1, device=numbers.device, dtype=dtype)
    return torch.searchsorted(numbers.to(dtype).sort().values, ends).diff()
