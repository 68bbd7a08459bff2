"""Copies of the tensors of a batch: the model may change its tensors in place after they were observed."""

from typing import Any

import numpy as np
import torch

from ...collection.kept import KeptBatch
from .counting import is_on_device
from .last import identity

_HUGE = 2**22  # bytes from which NumPy asks for huge pages


class Copies:
    """The tensors of all calls of a batch; none if they have more bytes than there is room for.

    A tensor that several layers take is copied once.

    Parameters
    ----------
    room : int
        In bytes.
    """

    def __init__(self, room: int) -> None:
        self._room, self._num_bytes = room, 0
        self._calls: list[tuple[str, torch.Tensor]] = []
        self._known: dict[Any, torch.Tensor] = {}
        self._last: torch.Tensor | None = None  # so that no other tensor gets its memory
        self._last_known: Any = None

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Copy what a layer takes or returns."""
        if self._num_bytes > self._room:
            return
        place = identity(tensor)[:-1]
        if not self._is_known(tensor, place):
            self._num_bytes += tensor.numel() * tensor.element_size()
            if self._num_bytes > self._room:
                self._calls, self._known, self._last = [], {}, None
                return
            self._known[place] = _copy(tensor)
        self._last, self._last_known = tensor, identity(tensor)
        self._calls.append((name, self._known[place]))

    def kept(self) -> KeptBatch | None:
        """Return the copies with the names of the layers, None if there was no room for them."""
        return None if self._num_bytes > self._room else KeptBatch(self._calls, self._num_bytes)

    def _is_known(self, tensor: torch.Tensor, place: Any) -> bool:
        """Return whether the tensor was copied before; its memory may have held another one then."""
        if place not in self._known:
            return False
        if is_on_device(tensor):  # to compare would wait for the device
            return bool(identity(tensor) == self._last_known)
        return torch.equal(self._known[place], tensor)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy; a large one lies in NumPy's memory, which comes in huge pages, where torch's comes in small ones.

    Both passes of a MobileNetV2 take 0.98 instead of 1.35 times two plain passes with it (AMD EPYC, 16 images).
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.nbytes < _HUGE:
        return tensor.clone()
    memory = torch.from_numpy(np.empty(tensor.nbytes, np.uint8))
    return memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)
