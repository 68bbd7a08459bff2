"""Which tensors of a run do not depend on the input of the model, and which parameters they come from."""

import weakref
from collections.abc import Iterable

import torch
from torch import nn


class Constants:
    """The parameters, the buffers, and what is computed from them alone in a run."""

    def __init__(self, model: nn.Module) -> None:
        self._fixed: dict[int, list[str]] = {id(buffer): [] for buffer in model.buffers()}
        self._fixed |= {id(p): [name] for name, p in model.named_parameters(remove_duplicate=False)}
        self._computed: dict[int, tuple[weakref.ref[torch.Tensor], list[str]]] = {}

    def __contains__(self, value: torch.Tensor) -> bool:
        return self.sources(value) is not None

    def sources(self, value: torch.Tensor) -> list[str] | None:
        """Return the names of the parameters that a constant is computed from; None for a tensor that varies."""
        if id(value) in self._fixed:
            return self._fixed[id(value)]
        known, names = self._computed.get(id(value), (None, None))
        return names if known is not None and known() is value else None

    def follow(self, given: Iterable[torch.Tensor], result: Iterable[torch.Tensor]) -> None:
        """Note whether what a function returned depends on constants alone."""
        found = [self.sources(value) for value in given]
        names = [*dict.fromkeys(name for one in found for name in one or ())]
        for value in result:
            if found and None not in found:
                self._computed[id(value)] = weakref.ref(value), names
            else:
                self._computed.pop(id(value), None)  # written in place
                self._fixed.pop(id(value), None)
