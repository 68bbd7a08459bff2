"""The statistics of a pass over the data: a monoid of ranges and int64 counts.

:func:`join` combines batches, processes and the two halves of an interrupted run. It is exact, associative and
commutative, so results do not depend on how the data were split or ordered.

A single pass does not know the range before it counts. Its histograms have a level k and lie over [-3**k, 3**k]. When a
larger value arrives, bins are merged three by three, which keeps their number odd and their edges aligned. Such a
histogram has three times as many bins as the settings ask for: up to two thirds are cut off as empty at the end.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

import klquant
from klquant.errors import InvalidInputError

from ..settings import MAX_ONE_PASS

Array: TypeAlias = np.ndarray[Any, Any]
Counts: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
LOWEST, HIGHEST = -9, round(math.log(MAX_ONE_PASS, 3))  # between these levels float32 x bins is exact in float64
_CHUNK = 2**16  # values of a float64 temporary that stays in the cache
_LARGEST = float(np.finfo(np.float32).max)


class Bins(NamedTuple):
    """The bins of one histogram: `num_bins` equal ones over [-amax, amax]."""

    num_bins: int
    amax: float
    level: int | None = None
    """k where `amax` is 3**k in a single pass."""

    @property
    def half_bins(self) -> tuple[float, float]:
        """Return (times, over): a value x lies ``x * times / over`` half bins from 0.

        For a level both products are exact, so merging bins gives the very counts of the wider range.
        """
        if self.level is None:
            return self.num_bins / self.amax, 1.0
        return self.num_bins * 3.0 ** max(-self.level, 0), 3.0 ** max(self.level, 0)


BinsFor: TypeAlias = Callable[[str, float], Bins | None]
"""The bins to count a tensor in, by its name and largest absolute value; None if only its range is wanted."""


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
    """Return the counts over a range that is wider by a power of three.

    Parameters
    ----------
    seen : Observation
    level : int
        At least that of the counts.

    Returns
    -------
    int64 array, shape (num_bins,)
    """
    hist = seen.counts
    if hist is not None and level is not None and seen.level is not None:
        for _ in range(level - seen.level):
            hist = _merge_threes(hist)
    return hist


def level_of(amax: float) -> int:
    """Return the lowest level whose range holds `amax`, within the levels that float64 counts exactly.

    Parameters
    ----------
    amax : float

    Returns
    -------
    int
    """
    return next((level for level in range(LOWEST, HIGHEST) if amax < 3.0**level), HIGHEST)


def count(values: Array, bins: Bins) -> Counts:
    """Count finite values on the host; what lies beyond the range goes to the end bins.

    Parameters
    ----------
    values : NumPy array of any shape, real
    bins : Bins

    Returns
    -------
    int64 array, shape (num_bins,)

    Raises
    ------
    InvalidInputError
        For NaN or infinity.
    """
    if bins.level is None:
        hist: Counts = klquant.histogram(values, num_bins=bins.num_bins, amax=bins.amax).hist
        return hist
    times, over = bins.half_bins
    total = np.zeros(bins.num_bins, np.int64)
    for part in np.split(values.reshape(-1), range(_CHUNK, values.size, _CHUNK)):
        single = np.clip(part.astype(np.float64), -_LARGEST, _LARGEST).astype(np.float32)
        scaled = single.astype(np.float64) * times / over
        total += klquant.histogram(scaled, num_bins=bins.num_bins, amax=float(bins.num_bins)).hist
    return total


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


def _merge_threes(hist: Counts) -> Counts:
    """Merge bins three by three around the centre bin; the number of bins stays, and the outer ones are empty."""
    merged = 2 * ((len(hist) // 2 + 1) // 3) + 1  # bins that get counts
    margin = (3 * merged - len(hist)) // 2
    inner = np.pad(hist, margin).reshape(merged, 3).sum(axis=1)
    return np.pad(inner, (len(hist) - merged) // 2)


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
    counted = {name: seen for name, seen in statistics.tensors.items() if seen.counts is not None and amax[name] > 0}
    return {name: _histogram(seen, amax[name]) for name, seen in counted.items()}


def _histogram(seen: Observation, amax: float) -> klquant.Histogram:
    """Return counts with their edges; those of a single pass without the empty bins outside."""
    hist = np.asarray(seen.counts)
    if seen.level is None:
        return klquant.Histogram(hist, _edges(len(hist), amax))
    width = 2 * 3.0**seen.level / len(hist)
    half = min(max(math.ceil(amax / width - 0.5), len(hist) // 6), len(hist) // 2)
    cut = len(hist) // 2 - half
    kept = hist[cut : len(hist) - cut].copy()
    kept[0], kept[-1] = hist[: cut + 1].sum(), hist[len(hist) - cut - 1 :].sum()
    return klquant.Histogram(kept, _edges(len(kept), width * len(kept) / 2))


def _edges(num_bins: int, amax: float) -> Array:
    edges: Array = klquant.histogram(np.zeros(0), num_bins=num_bins, amax=amax).edges
    return edges
