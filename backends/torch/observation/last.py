"""Look once at a tensor that several layers take one after the other, as query, key and value projections do."""

from typing import Any

import torch

from ...collection import Bins, Counted
from .counting import count, extremes, is_on_device, look_on_host
from .host_counting import Buffers


class Last:
    """Ranges and counts of the tensor that was given last."""

    def __init__(self, buffers: Buffers) -> None:
        self._known: tuple[Any, ...] = ()
        self._tensor: torch.Tensor | None = None  # kept, so that no other tensor gets its memory
        self._extremes: tuple[float, float] | None = None
        self._counts: dict[Bins, Counted] = {}
        self._buffers = buffers

    def extremes(self, tensor: torch.Tensor) -> tuple[float, float]:
        """Return what :func:`extremes` returns; what :meth:`count` has found is not looked for again."""
        self._take(tensor)
        self._extremes = self._extremes or extremes(tensor)
        return self._extremes

    def count(self, tensor: torch.Tensor, bins: Bins) -> Counted:
        """Return what :func:`count` returns."""
        self._take(tensor)
        if bins not in self._counts and is_on_device(tensor):
            self._counts[bins] = count(tensor, bins)
        elif bins not in self._counts:
            low, high, self._counts[bins] = look_on_host(tensor, bins, self._buffers)
            self._extremes = low, high
        return self._counts[bins]

    def _take(self, tensor: torch.Tensor) -> None:
        known = identity(tensor)
        if known != self._known:
            self._known, self._tensor, self._counts, self._extremes = known, tensor, {}, None


def identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return what is equal for two tensors with the same values, as long as one of them is alive; last its version."""
    version: Any = object() if tensor.is_inference() else tensor._version  # inference mode counts no versions
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, version
