"""The simplest model that the collector can observe: a batch is a mapping of arrays, and each array is a tensor."""

import functools
import hashlib
from typing import NamedTuple

from klquant.backends.collection import add_call, count, look
from klquant.errors import KLQuantError


class ArrayModel(NamedTuple):
    """Observes the arrays of a batch. A list of arrays under one name means several calls."""

    names: tuple = ("x",)
    kind: str = "tensor"
    log: list = []  # noqa: RUF012 shared on purpose: what was run

    def observe(self, batch, bins_for, number):
        self.log.append(number)
        found = {}
        for name, arrays in batch.items():
            for x in arrays if isinstance(arrays, list) else [arrays]:
                low, high = (float(x.min()), float(x.max())) if x.size else (0.0, 0.0)
                try:
                    add_call(found, name, look(name, low, high, bins_for, functools.partial(count, x)))
                except KLQuantError as error:
                    raise type(error)(f"tensor `{name}`, batch {number}: {error}") from error
        return found

    def digest(self, batch):
        return hashlib.sha256(b"".join(x.tobytes() for x in batch.values())).hexdigest()


def as_data(statistics):
    """Return statistics in a form that compares by value."""
    tensors = {
        name: (*seen[:3], None if seen.counts is None else seen.counts.tolist(), *seen[4:])
        for name, seen in sorted(statistics.tensors.items())
    }
    return tensors, statistics.num_batches
