"""Calibrate over several processes: each sees its own part of the data, all end with the same statistics, bit for bit.

Without a process group every function here returns what it was given. What is sent are numbers and JSON, no pickles.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import distributed as dist

from klquant.errors import InvalidInputError, PeerError

from ...collection import Statistics, at_level

_TAG = 6013  # of messages that mean nothing but that a process is there
Group: TypeAlias = Any  # a torch.distributed.ProcessGroup, or None for this process alone


def rank_of(group: Group) -> int:
    """Return the number of this process in the group."""
    return 0 if group is None else int(dist.get_rank(group))


def total(number: int, group: Group) -> int:
    """Return the sum of a number over all processes."""
    return int(_reduced(np.array([number]), dist.ReduceOp.SUM, group)[0])


def share(value: Any, group: Group) -> Any:
    """Return what the first process that has a value (not None) holds, as JSON gives it back; None if nobody has."""
    if group is None:
        return value
    has = np.zeros(dist.get_world_size(group), np.int64)
    text = json.dumps(value).encode()
    has[rank_of(group)] = 0 if value is None else len(text)
    lengths = _reduced(has, dist.ReduceOp.SUM, group)
    if not lengths.any():
        return None
    source = int(np.flatnonzero(lengths)[0])
    sent = np.frombuffer(text, np.uint8) if source == rank_of(group) else np.zeros(int(lengths[source]), np.uint8)
    return json.loads(_reduced(sent.astype(np.int64), dist.ReduceOp.SUM, group).astype(np.uint8).tobytes())


def join_all(statistics: Statistics, names: Sequence[str], group: Group) -> Statistics:
    """Return the statistics of the data of all processes; `names` are the layers of the model, in the same order."""
    if group is None:
        return statistics
    fields = (statistics.amax, statistics.calls, statistics.level)
    own = np.array([[field.get(name, -np.inf) for name in names] for field in fields], np.float64)
    amax, calls, level = _reduced(own, dist.ReduceOp.MAX, group)
    sizes = [(len(hist), hist.sum(dtype=np.float64)) for hist in statistics.hist.values()]
    bins, most = _reduced(np.array([*sizes, (0, 0)], np.float64).max(axis=0), dist.ReduceOp.MAX, group)
    if most * dist.get_world_size(group) >= 2.0**63:
        raise InvalidInputError(f"the counts of all processes must stay below 2**63, got {most:.4g} of a layer in one")
    counts = np.zeros((len(names), int(bins)), np.int64)
    levels = {name: int(k) for name, k in zip(names, level, strict=True) if np.isfinite(k)}
    for row, name in zip(counts, names, strict=True):
        if name in statistics.hist:
            row[:] = at_level(statistics, name, levels.get(name, 0))
    counts = _reduced(counts, dist.ReduceOp.SUM, group) if bins else counts
    return Statistics(
        {name: float(k) for name, k in zip(names, amax, strict=True) if np.isfinite(k)},
        {name: int(k) for name, k in zip(names, calls, strict=True) if np.isfinite(k)},
        {name: row for name, row in zip(names, counts, strict=True) if row.any()},
        levels,
    )


@contextmanager
def failing_together(group: Group) -> Iterator[None]:
    """Let an error in one process end all of them with an error, instead of leaving the others waiting."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    told = None if failure is None else [rank_of(group), f"{type(failure).__name__}: {failure}"]
    try:
        failed = share(told, group)
    except PeerError as gone:
        raise failure or gone from None
    if failure is not None:
        raise failure
    if failed is not None:
        raise PeerError(f"process {failed[0]} of the group failed: {failed[1]}")


def _reduced(values: "np.ndarray[Any, Any]", operation: Any, group: Group) -> "np.ndarray[Any, Any]":
    if group is None:
        return values
    backend = str(dist.get_backend(group))
    on_gpu = "nccl" in backend and "gloo" not in backend
    if not on_gpu:  # nccl has a watchdog of its own
        _call_roll(group)
    tensor = torch.from_numpy(values.copy()).to("cuda" if on_gpu else "cpu")
    try:
        dist.all_reduce(tensor, op=operation, group=group)
    except RuntimeError as error:
        _call_roll(group, wait=False)
        raise PeerError(f"a process of the group is gone: {error}") from error
    return tensor.cpu().numpy()


def _call_roll(group: Group, *, wait: bool = True) -> None:
    """Wait for all processes, and name those that are gone: the error of a reduction tells no more than a port."""
    works: dict[int, list[Any]] = {}
    gone: dict[int, RuntimeError] = {}
    for rank in (rank for rank in range(dist.get_world_size(group)) if rank != rank_of(group)):
        peer = dist.get_global_rank(group, rank)
        with _blaming(rank, gone):
            sent = dist.isend(torch.zeros(1), peer, group, _TAG)
            works[rank] = [sent, dist.irecv(torch.zeros(1), peer, group, _TAG)]
    for rank, pending in works.items():
        with _blaming(rank, gone):
            for work in pending if wait else []:
                work.wait()
    if gone:
        who = ", ".join(f"process {rank}" for rank in sorted(gone))
        raise PeerError(f"{who} of the group: gone, or not here within the timeout") from gone[min(gone)]


@contextmanager
def _blaming(rank: int, gone: dict[int, RuntimeError]) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        gone[rank] = error
