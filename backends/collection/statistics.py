"""The statistics of a pass over the data: a monoid of ranges and int64 counts.

:func:`join` combines batches, processes and the two halves of an interrupted run. It is exact, associative and
commutative, so results do not depend on how the data were split or ordered.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import klquant
from klquant.errors import InvalidInputError

from .bins import Bins, BinsFor, Counts, to_histogram, widened


class Observation(NamedTuple):
    """What a pass has seen of one tensor."""

    low: float
    """Smallest value."""
    high: float
    """Largest value."""
    calls: int = 1
    """How often the model computed the tensor within one batch, at most."""
    counts: Counts | None = None
    """Shape (num_bins,); None where only the range was asked for."""
    level: int | None = None
    """Of the counts, in a single pass."""

    @property
    def amax(self) -> float:
        """Return the largest absolute value."""
        return max(abs(self.low), abs(self.high))


class Statistics(NamedTuple):
    """What a pass has seen of all tensors, by name, in how many batches."""

    tensors: dict[str, Observation]
    num_batches: int

    @property
    def amax(self) -> dict[str, float]:
        """Return the largest absolute values."""
        return {name: seen.amax for name, seen in self.tensors.items()}


def empty() -> Statistics:
    """Return the neutral element.

    Returns
    -------
    Statistics
    """
    return Statistics({}, 0)


def join(a: Statistics, b: Statistics) -> Statistics:
    """Return the statistics of the data of both.

    Parameters
    ----------
    a, b : Statistics
        Of the same kind of pass.

    Returns
    -------
    Statistics

    Raises
    ------
    InvalidInputError
        If a count exceeds int64, or the numbers of bins differ; naming the tensor.
    """
    both = {name: _join_named(name, a.tensors[name], b.tensors[name]) for name in a.tensors.keys() & b.tensors.keys()}
    return Statistics({**a.tensors, **b.tensors, **both}, a.num_batches + b.num_batches)


def look(name: str, low: float, high: float, bins_for: BinsFor, count_into: Callable[[Bins], Counts]) -> Observation:
    """Return what one tensor holds: its range, and its counts where they are asked for.

    Parameters
    ----------
    name : str
    low, high : float
        Smallest and largest value; NaN if there is a NaN, 0 for an empty tensor.
    bins_for : callable
        What the pass gave to :meth:`~klquant.backends.collection.ObservedModel.observe`.
    count_into : callable (Bins) -> int64 array
        Counts the tensor; called at most once, such as ``functools.partial(count, values)``.

    Returns
    -------
    Observation

    Raises
    ------
    InvalidInputError
        For NaN or infinity, and what `bins_for` refuses.
    """
    low, high = float(low), float(high)
    amax = max(abs(low), abs(high))
    if not amax < math.inf:
        raise InvalidInputError(f"activations must be finite, got {amax}")
    bins = bins_for(name, amax)
    return Observation(low, high, 1) if bins is None else Observation(low, high, 1, count_into(bins), bins.level)


def add_call(found: dict[str, Observation], name: str, seen: Observation) -> None:
    """Add one more call of the same batch.

    Parameters
    ----------
    found : dict
        The observations of this batch, changed in place.
    name : str
    seen : Observation

    Raises
    ------
    InvalidInputError
        As for :func:`join`.
    """
    if name in found:
        calls = found[name].calls + seen.calls
        seen = _join_named(name, found[name], seen)._replace(calls=calls)
    found[name] = seen


def at_level(seen: Observation, level: int | None) -> Counts | None:
    """Return the counts over a range that is wider by powers of three, in a single pass."""
    if seen.counts is None or seen.level is None or level is None:
        return seen.counts
    return widened(seen.counts, level - seen.level)


def _join_named(name: str, a: Observation, b: Observation) -> Observation:
    levels = [level for level in (a.level, b.level) if level is not None]
    level = max(levels, default=None)
    counts = _add(name, [part for seen in (a, b) if (part := at_level(seen, level)) is not None])
    return Observation(min(a.low, b.low), max(a.high, b.high), max(a.calls, b.calls), counts, level)


def _add(name: str, parts: list[Counts]) -> Counts | None:
    if len(parts) < 2:
        return parts[0] if parts else None
    first, second = parts
    if len(first) != len(second):
        raise InvalidInputError(f"histograms of `{name}` must have one number of bins, got {len(first)}, {len(second)}")
    total = first + second
    if total.min() < 0:  # int64 wraps silently
        raise InvalidInputError(f"the counts of `{name}` must stay below 2**63, got more after {first.max():.4g}")
    return total


def histograms_of(statistics: Statistics, amax: Mapping[str, float]) -> dict[str, klquant.Histogram]:
    """Return the histograms of the last pass; tensors that are always 0 have none.

    Parameters
    ----------
    statistics : Statistics
    amax : mapping
        The ranges that were counted over, by name.

    Returns
    -------
    dict
        Histogram by name.
    """
    return {
        name: to_histogram(seen.counts, amax[name], seen.level)
        for name, seen in statistics.tensors.items()
        if seen.counts is not None and amax[name] > 0
    }
