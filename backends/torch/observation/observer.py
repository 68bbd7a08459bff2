"""A PyTorch model as the collector sees it: functions of a batch."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ...collection import Observation, add_call
from ...collection.bins import BinsFor
from ..model.forward import Forward, Where, call_model, run_observed
from ..model.layers import observed_layers, tensor_bytes
from .host_counting import Buffers
from .last import Last
from .pending import Pending, observe_tensor, resolve


@dataclass(frozen=True)
class TorchObserver:
    """A model as an :class:`~klquant.backends.collection.ObservedModel`: what enters or leaves its layers."""

    model: nn.Module
    observe_at: Where = "inputs"
    forward: Forward = call_model
    kind: str = "layer"
    buffers: Buffers = field(default_factory=Buffers, repr=False)
    """To count in, for all batches."""

    @property
    def names(self) -> list[str]:
        """Return the qualified names of the layers."""
        return [name for name, _ in observed_layers(self.model)]

    def observe(self, batch: Any, bins_for: BinsFor, number: int) -> dict[str, Observation]:
        """Run the model on a batch; return what each layer saw."""
        found: dict[str, Observation] = {}
        pending: list[Pending] = []
        last = Last(self.buffers)

        def observer(name: str, tensor: torch.Tensor) -> None:
            with torch._C.DisableTorchFunction():  # what is computed here is no use of the layer's output
                seen = observe_tensor(name, tensor, bins_for, last)
            if isinstance(seen, Pending):
                pending.append(seen)
            else:
                add_call(found, name, seen)

        run_observed(self.model, [batch], observer, observe=self.observe_at, forward=self.forward, first=number)
        for name, seen in resolve(pending, bins_for, number):
            add_call(found, name, seen)
        return found

    def digest(self, batch: Any) -> str:
        """Return a hash of the tensors, arrays, numbers and strings in a batch."""
        digest = hashlib.sha256()
        for leaf in tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch):
            if isinstance(leaf, torch.Tensor):
                digest.update(tensor_bytes(leaf))
            elif isinstance(leaf, np.ndarray):
                digest.update(np.ascontiguousarray(leaf).tobytes())
            elif isinstance(leaf, (str, int, float)):
                digest.update(repr(leaf).encode())
        return digest.hexdigest()
