"""The statistics of one batch while they are still on a device: they cross to the host together."""

import functools
from typing import NamedTuple

import torch

from klquant.errors import KLQuantError

from ...collection import Bins, Counted, Observation, look
from ...collection.bins import BinsFor
from .counting import count_on_device, extremes_on_device, is_on_device
from .last import Last


class Pending(NamedTuple):
    """What a call of a layer gave, on its device."""

    name: str
    bins: Bins | None
    values: torch.Tensor
    """int64: the bits of the smallest and the largest value, then :func:`count_on_device`."""


def observe_tensor(name: str, tensor: torch.Tensor, bins_for: BinsFor, last: Last) -> Observation | Pending:
    """Return what a tensor holds; pending if it is on a device and its bins do not depend on its values."""
    bins = bins_for(name, 0.0)
    known = bins is not None and bins.level is None
    if not is_on_device(tensor) and bins is not None and known:
        last.count(tensor, bins)  # finds the extremes too
    if not is_on_device(tensor) or (bins is not None and not known):
        return look(name, *last.extremes(tensor), bins_for, functools.partial(last.count, tensor))
    ends = extremes_on_device(tensor).view(torch.int64)
    return Pending(name, bins, ends if bins is None else torch.cat([ends, count_on_device(tensor, bins)]))


def resolve(pending: list[Pending], bins_for: BinsFor, number: int) -> list[tuple[str, Observation]]:
    """Return the observations by name after one transfer; errors name layer and batch."""
    if not pending:
        return []
    values = torch.cat([one.values for one in pending]).cpu()
    parts = values.split([len(one.values) for one in pending])
    return [(one.name, _read(one, part, bins_for, number)) for one, part in zip(pending, parts, strict=True)]


def _read(one: Pending, values: torch.Tensor, bins_for: BinsFor, number: int) -> Observation:
    low, high = values[:2].view(torch.float64).tolist()
    counted = Counted(values[2:-2].numpy().copy(), int(values[-2]) if one.bins else 0)
    try:
        seen = look(one.name, low, high, bins_for, lambda bins: counted)
    except KLQuantError as error:
        raise type(error)(f"layer `{one.name}`, batch {number}: {error}") from error
    return seen if one.bins is None else seen._replace(beyond=int(values[-1]))  # counted where the values were
