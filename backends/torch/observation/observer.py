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
from ...collection.kept import KeptBatch
from ..model.forward import Forward, Observer, Where, call_model, run_observed
from ..model.layers import observed_layers, tensor_bytes
from .copies import Copies
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
        seen = _Batch(bins_for, number, self.buffers)
        self._run(batch, seen.add, number)
        return seen.result()

    def observe_and_keep(
        self, batch: Any, bins_for: BinsFor, number: int, room: int
    ) -> tuple[dict[str, Observation], KeptBatch | None]:
        """Run the model on a batch; return what each layer saw, and copies of it if there is room for them."""
        seen, copies = _Batch(bins_for, number, self.buffers), Copies(room)

        def observer(name: str, tensor: torch.Tensor) -> None:
            seen.add(name, tensor)
            copies.add(name, tensor)

        self._run(batch, observer, number)
        return seen.result(), copies.kept()

    def observe_kept(self, kept: KeptBatch, bins_for: BinsFor, number: int) -> dict[str, Observation]:
        """Return what each layer saw of a batch, without a run."""
        seen = _Batch(bins_for, number, self.buffers)
        with torch.no_grad():
            for name, tensor in kept.tensors:
                seen.add(name, tensor)
        return seen.result()

    def _run(self, batch: Any, observer: Observer, number: int) -> None:
        def plainly(name: str, tensor: torch.Tensor) -> None:
            with torch._C.DisableTorchFunction():  # what is computed here is no use of the layer's output
                observer(name, tensor)

        run_observed(self.model, [batch], plainly, observe=self.observe_at, forward=self.forward, first=number)

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


class _Batch:
    """What the layers have seen of one batch so far."""

    def __init__(self, bins_for: BinsFor, number: int, buffers: Buffers) -> None:
        self._bins_for, self._number, self._last = bins_for, number, Last(buffers)
        self._found: dict[str, Observation] = {}
        self._pending: list[Pending] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        seen = observe_tensor(name, tensor, self._bins_for, self._last)
        if isinstance(seen, Pending):
            self._pending.append(seen)
        else:
            add_call(self._found, name, seen)

    def result(self) -> dict[str, Observation]:
        for name, seen in resolve(self._pending, self._bins_for, self._number):
            add_call(self._found, name, seen)
        return self._found
