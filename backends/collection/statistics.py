"""The statistics of a pass over the data: a monoid of ranges and int64 counts.

:func:`join` combines batches, processes and the two halves of an interrupted run. It is exact, associative and
commutative, so results do not depend on how the data were split or ordered.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

import klquant
from klquant.errors import InvalidInputError

from ..guard import CROWDED
from .bins import Bins, BinsFor, Counted, Counts, to_histogram, widened

RESOLVED = 0.9999  # of the non-zero values are within a narrower range


class Observation(NamedTuple):
    """What a pass has seen of one tensor."""

    low: float
    """Smallest value."""
    high: float
    """Largest value; below `low`, both infinite, if all tensors so far were empty."""
    calls: int = 1
    """How often the model computed the tensor within one batch, at most."""
    counts: Counts | None = None
    """Shape (num_bins,); None where only the range was asked for."""
    bins: Bins | None = None
    """Of the counts."""
    zeros: int = 0
    """How many values are exactly 0, if they were counted."""
    beyond: int = 0
    """How many values lie beyond the bins, if they were counted."""

    @property
    def amax(self) -> float:
        """Return the largest absolute value."""
        return largest(self.low, self.high)


def largest(low: float, high: float) -> float:
    """Return the largest absolute value in a range; 0 for an empty one, NaN if a bound is."""
    return 0.0 if low > high else max(abs(low), abs(high))


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


def look(name: str, low: float, high: float, bins_for: BinsFor, count_into: Callable[[Bins], Counted]) -> Observation:
    """Return what one tensor holds: its range, and its counts where they are asked for.

    Parameters
    ----------
    name : str
    low, high : float
        Smallest and largest value; NaN if there is a NaN, `inf` and `-inf` for an empty tensor.
    bins_for : callable
        What the pass gave to :meth:`~klquant.backends.collection.ObservedModel.observe`.
    count_into : callable (Bins) -> Counted
        Counts the tensor, such as ``functools.partial(count, values)``.

    Returns
    -------
    Observation

    Raises
    ------
    InvalidInputError
        For NaN or infinity, and what `bins_for` refuses.
    """
    low, high = float(low), float(high)
    amax = largest(low, high)
    if not amax < math.inf:
        raise InvalidInputError(f"activations must be finite, got {amax}")
    bins = bins_for(name, amax)
    if bins is None:
        return Observation(low, high)
    counts, zeros = count_into(bins)
    return Observation(low, high, 1, counts, bins, zeros, _count_beyond(bins, count_into) if amax > bins.amax else 0)


def _count_beyond(bins: Bins, count_into: Callable[[Bins], Counted]) -> int:
    """Count the values outside of the bins: the outer two of three bins whose inner edges are just beyond them."""
    outer = count_into(Bins(3, 3 * math.nextafter(bins.amax, math.inf))).counts
    return int(outer[0] + outer[2])


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
    if seen.counts is None or seen.bins is None or seen.bins.level is None or level is None:
        return seen.counts
    return widened(seen.counts, level - seen.bins.level)


def _join_named(name: str, a: Observation, b: Observation) -> Observation:
    bins = _joined_bins(name, a.bins, b.bins)
    level = None if bins is None else bins.level
    counts = _add(name, [part for seen in (a, b) if (part := at_level(seen, level)) is not None])
    calls, sums = max(a.calls, b.calls), (a.zeros + b.zeros, a.beyond + b.beyond)
    return Observation(min(a.low, b.low), max(a.high, b.high), calls, counts, bins, *sums)


def _joined_bins(name: str, a: Bins | None, b: Bins | None) -> Bins | None:
    """Return the wider bins of a single pass; those of two passes must be the same."""
    if a is None or b is None:
        return a or b
    growing = a.level is not None and b.level is not None and a.num_bins == b.num_bins
    if a != b and not growing:
        raise InvalidInputError(f"histograms of `{name}` must have the same bins, got {a} and {b}")
    return max(a, b, key=lambda bins: bins.amax)


def _add(name: str, parts: list[Counts]) -> Counts | None:
    if len(parts) < 2:
        return parts[0] if parts else None
    first, second = parts
    total = first + second
    if total.min() < 0:  # int64 wraps silently
        raise InvalidInputError(f"the counts of `{name}` must stay below 2**63, got more after {first.max():.4g}")
    return total


def narrower_ranges(statistics: Statistics) -> dict[str, float]:
    """Return ranges that resolve the tensors whose values are mostly in the centre bin, because of a few outliers.

    Parameters
    ----------
    statistics : Statistics
        Of :func:`collect_counts`.

    Returns
    -------
    dict
        The range that holds 99.99 % of the non-zero values, by name; only where it is narrower than the bins.
    """
    ranges = {name: _narrower(seen) for name, seen in statistics.tensors.items() if seen.counts is not None}
    return {name: amax for name, amax in ranges.items() if amax}


def _narrower(seen: Observation) -> float:
    counts, bins = np.asarray(seen.counts), seen.bins
    centre = len(counts) // 2
    others = int(counts.sum()) - seen.zeros
    if bins is None or bins.level is not None or counts[centre] - seen.zeros <= CROWDED * others:
        return 0.0
    within = np.cumsum([counts[centre] - seen.zeros, *(counts[centre + 1 :] + counts[centre - 1 :: -1])])
    steps = int(np.searchsorted(within, RESOLVED * others))
    return bins.amax * (2 * steps + 1) / bins.num_bins if steps < centre else 0.0


def histograms_of(statistics: Statistics, max_amax: float = math.inf) -> dict[str, tuple[klquant.Histogram, int]]:
    """Return the histograms of the last pass; tensors that are always 0 have none.

    Parameters
    ----------
    statistics : Statistics
    max_amax : float
        The cap on the range of a single pass.

    Returns
    -------
    dict
        A Histogram and the number of values beyond its range, by name.
    """
    found = {}
    for name, seen in statistics.tensors.items():
        if seen.counts is not None and seen.bins is not None and seen.amax > 0:
            histogram, outside = to_histogram(seen.counts, seen.bins, min(seen.amax, max_amax))
            found[name] = histogram, max(seen.beyond, outside if seen.amax > max_amax else 0)
    return found
