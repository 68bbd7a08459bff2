"""Calibrate in several processes: each sees its own part of the data, and all get the same statistics, bit for bit.

The processes form a group of torch.distributed, whatever framework runs the model; PyTorch is imported only then. A
backend may bring another kind of group, which reduces arrays itself: an object with `rank`, `size` and `reduce_arrays`.
Without a group every function here returns its argument. Messages are numbers and JSON, never pickles.
"""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np

from klquant.errors import CalibrationWarning, InvalidInputError, PeerError

from .bins import Array, Bins
from .statistics import Observation, Statistics, at_level

_TAG = 6013  # of messages that mean nothing but that a process is there
Group: TypeAlias = Any  # a torch.distributed.ProcessGroup, or None for this process alone


def rank_of(group: Group) -> int:
    """Return the number of this process in the group."""
    return 0 if group is None else int(group.rank())


@contextmanager
def warning_once(group: Group) -> Iterator[None]:
    """Leave warnings about what all processes find alike to the first of them."""
    if not rank_of(group):
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        yield


def share(value: Any, group: Group) -> Any:
    """Return what the first process that has a value (not None) holds, as JSON gives it back; None if nobody has."""
    if group is None:
        return value
    has = np.zeros(group.size(), np.int64)
    text = json.dumps(value).encode()
    has[rank_of(group)] = 0 if value is None else len(text)
    lengths = _reduced(has, "SUM", group)
    if not lengths.any():
        return None
    source = int(np.flatnonzero(lengths)[0])
    sent = np.frombuffer(text, np.uint8) if source == rank_of(group) else np.zeros(int(lengths[source]), np.uint8)
    return json.loads(_reduced(sent.astype(np.int64), "SUM", group).astype(np.uint8).tobytes())


def join_all(statistics: Statistics, names: Sequence[str], group: Group) -> Statistics:
    """Return the statistics of the data of all processes; `names` are those of the model, in the same order."""
    if group is None:
        return statistics
    tensors = statistics.tensors
    own = np.array([_row(tensors.get(name)) for name in names], np.float64).reshape(len(names), 6)
    most = max((seen.counts.sum(dtype=np.float64) for seen in tensors.values() if seen.counts is not None), default=0.0)
    if _reduced(np.array([most]), "MAX", group)[0] * group.size() >= 2.0**63:
        raise InvalidInputError(f"the counts of all processes must stay below 2**63, got {most:.4g} of a tensor in one")
    rows = _reduced(own, "MAX", group)
    sums = _reduced(_sums(tensors, names, rows), "SUM", group)
    num_batches = int(_reduced(np.array([statistics.num_batches]), "SUM", group)[0])
    both = zip(names, rows, sums, strict=True)
    return Statistics({name: _observation(row, numbers) for name, row, numbers in both if row[2] > 0}, num_batches)


def _row(seen: Observation | None) -> tuple[float, ...]:
    """Return numbers whose maximum over all processes describes the tensor: -low, high, calls, and its bins."""
    if seen is None:
        return (-np.inf,) * 6
    bins = seen.bins or (0, -np.inf, None)
    return -seen.low, seen.high, seen.calls, bins[0], bins[1], -np.inf if bins[2] is None else bins[2]


def _bins(row: Array) -> Bins | None:
    num_bins, amax, level = row[3:].tolist()
    return Bins(int(num_bins), amax, int(level) if level > -np.inf else None) if num_bins > 0 else None


def _sums(tensors: Mapping[str, Observation], names: Sequence[str], rows: Array) -> Array:
    """Return what is added up of every tensor, in the bins that all processes have: zeros, values beyond, counts."""
    sums = np.zeros((len(names), 2 + int(max(rows[:, 3].max(initial=0), 0))), np.int64)
    for numbers, name, row in zip(sums, names, rows, strict=True):
        seen, bins = tensors.get(name), _bins(row)
        if seen is not None and seen.counts is not None and bins is not None:
            numbers[:2] = seen.zeros, seen.beyond
            numbers[2 : 2 + bins.num_bins] = np.asarray(at_level(seen, bins.level))
    return sums


def _observation(row: Array, numbers: Array) -> Observation:
    low, high, calls = row[:3].tolist()
    bins = _bins(row)
    counts = None if bins is None else numbers[2 : 2 + bins.num_bins].copy()
    return Observation(-low, high, int(calls), counts, bins, *numbers[:2].tolist())


def add_up(values: Array, group: Group) -> Array:
    """Return the sum over all processes, elementwise."""
    return values if group is None else _reduced(values, "SUM", group)


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


def _reduced(values: "np.ndarray[Any, Any]", operation: str, group: Group) -> "np.ndarray[Any, Any]":
    if hasattr(group, "reduce_arrays"):  # a group of another framework
        reduced: np.ndarray[Any, Any] = group.reduce_arrays(values, operation)
        return reduced
    import torch
    from torch import distributed as dist

    backend = str(dist.get_backend(group))
    on_gpu = "nccl" in backend and "gloo" not in backend
    if not on_gpu:  # nccl has its own watchdog
        _call_roll(group)
    tensor = torch.from_numpy(values.copy()).to("cuda" if on_gpu else "cpu")
    try:
        dist.all_reduce(tensor, op=getattr(dist.ReduceOp, operation), group=group)
    except RuntimeError as error:
        _call_roll(group, wait=False)
        raise PeerError(f"a process of the group is gone: {error}") from error
    return tensor.cpu().numpy()


def _call_roll(group: Group, *, wait: bool = True) -> None:
    """Wait for all processes and name those that are gone: a failed reduction only names a port."""
    import torch
    from torch import distributed as dist

    works: dict[int, list[Any]] = {}
    gone: dict[int, RuntimeError] = {}
    for rank in (rank for rank in range(group.size()) if rank != group.rank()):
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
