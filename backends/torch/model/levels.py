"""How deep in the network a tensor is."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary


class Levels:
    """The largest number of layers on a path from the input of the model to each tensor that depends on it."""

    def __init__(self) -> None:
        self._known: Any = WeakTensorKeyDictionary()

    def of(self, values: Iterable[torch.Tensor]) -> int:
        """Return the level of the deepest tensor; -1 if none depends on the input."""
        return max((self._known.get(value, -1) for value in values), default=-1)

    def note(self, values: Iterable[torch.Tensor], level: int) -> None:
        """Note the level of tensors."""
        for value in values if level >= 0 else ():
            self._known[value] = level
