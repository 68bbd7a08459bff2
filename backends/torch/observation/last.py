"""Look once at a tensor that several layers take one after the other, as query, key and value projections do."""

from typing import Any

import torch

from ...collection import Bins, Counted
from .counting import count, extremes, flat


class Last:
    """Ranges and counts of the tensor that was given last."""

    def __init__(self) -> None:
        self._known: tuple[Any, ...] = ()
        self._tensor: torch.Tensor | None = None  # kept, so that no other tensor gets its memory
        self._flat = torch.empty(0)
        self._extremes = (0.0, 0.0)
        self._counts: dict[Bins, Counted] = {}

    def extremes(self, tensor: torch.Tensor) -> tuple[float, float]:
        """Return what :func:`extremes` returns."""
        self._take(tensor)
        return self._extremes

    def count(self, tensor: torch.Tensor, bins: Bins) -> Counted:
        """Return what :func:`count` returns."""
        self._take(tensor)
        if bins not in self._counts:
            self._counts[bins] = count(self._flat, bins)
        return self._counts[bins]

    def _take(self, tensor: torch.Tensor) -> None:
        version: Any = object() if tensor.is_inference() else tensor._version  # inference mode counts no versions
        known = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, version)
        if known != self._known:
            self._known, self._tensor, self._counts = known, tensor, {}
            self._flat = flat(tensor)
            self._extremes = extremes(self._flat)
