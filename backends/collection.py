"""What a pass over the data collects, as data: a monoid of maxima and int64 sums.

Batches, processes and the two halves of an interrupted run are all joined by :func:`join`, which is exact,
associative and commutative: neither the split of the data nor their order shows.

With one pass the range is not known before the counts. There a histogram of level k lies over [-3**k, 3**k]; when a
larger value comes its bins are merged three by three, which keeps an odd number of bins aligned. There are three times
as many bins as asked for: in the end the empty ones outside are cut off, two thirds of them at most.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

import klquant
from klquant.errors import InvalidInputError

from .settings import MAX_ONE_PASS

Counts: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"


_Number = TypeVar("_Number", int, float)
_DRIFT = 1.01  # float kernels may round differently from pass to pass; different data exceed this
LOWEST, HIGHEST = (
    -9,
    round(math.log(MAX_ONE_PASS, 3)),
)  # levels where float32 values times bins are exact in float64, so that all levels agree


class Statistics(NamedTuple):
    """Of every layer that was called, by qualified name."""

    amax: dict[str, float]
    """Largest absolute value."""
    calls: dict[str, int]
    """How often one batch called the layer, at most."""
    hist: dict[str, Counts]
    """Counts, shape (num_bins,)."""
    level: dict[str, int]
    """The level of the counts, with one pass."""


def nothing() -> Statistics:
    """Return the neutral element."""
    return Statistics({}, {}, {}, {})


def join(a: Statistics, b: Statistics) -> Statistics:
    """Return the statistics of the data of both."""
    level = _larger(a.level, b.level)

    def counts(name: str) -> Counts:
        return _sum(at_level(part, name, level.get(name, 0)) for part in (a, b) if name in part.hist)

    hist = {name: counts(name) for name in dict.fromkeys([*a.hist, *b.hist])}
    return Statistics(_larger(a.amax, b.amax), _larger(a.calls, b.calls), hist, level)


def _larger(a: Mapping[str, _Number], b: Mapping[str, _Number]) -> dict[str, _Number]:
    return {name: max(part[name] for part in (a, b) if name in part) for name in dict.fromkeys([*a, *b])}


def _sum(parts: Iterable[Counts]) -> Counts:
    first, *others = parts
    total = sum(others, start=first)
    if total.min() < 0:  # int64 goes round without a word
        raise InvalidInputError(f"the counts of a layer must stay below 2**63, got more after {first.max():.4g}")
    return total


def at_level(statistics: Statistics, name: str, level: int) -> Counts:
    """Return the counts of a layer over a range that is a power of three wider."""
    hist = statistics.hist[name]
    for _ in range(level - statistics.level.get(name, level)):
        hist = _merge_threes(hist)
    return hist


def _merge_threes(hist: Counts) -> Counts:
    """Merge bins three by three, the centre bin with its neighbours; as many bins again, the outer ones empty."""
    merged = 2 * ((len(hist) // 2 + 1) // 3) + 1  # bins that get counts
    margin = (3 * merged - len(hist)) // 2
    inner = np.pad(hist, margin).reshape(merged, 3).sum(axis=1)
    return np.pad(inner, (len(hist) - merged) // 2)


def growing_histogram(statistics: Statistics, name: str, max_amax: float) -> klquant.Histogram:
    """Return the histogram of one pass, cut down to the bins that hold values; values beyond are in the end bins."""
    hist, amax = statistics.hist[name], min(statistics.amax[name], max_amax)
    width = 2 * 3.0 ** statistics.level[name] / len(hist)
    half = min(max(math.ceil(amax / width - 0.5), len(hist) // 6), len(hist) // 2)
    cut = len(hist) // 2 - half
    kept = hist[cut : len(hist) - cut].copy()
    kept[0], kept[-1] = hist[: cut + 1].sum(), hist[len(hist) - cut - 1 :].sum()
    empty = klquant.histogram(np.zeros(0), num_bins=len(kept), amax=width * len(kept) / 2)
    return klquant.Histogram(kept, empty.edges)


def _level_of(amax: float) -> int:
    return next((level for level in range(LOWEST, HIGHEST) if amax < 3.0**level), HIGHEST)


def _add(batch: Statistics, name: str, counts: Counts) -> None:
    batch.hist[name] = _sum([counts, batch.hist[name]]) if name in batch.hist else counts


def _finite(amax: float) -> float:
    if not amax < float("inf"):
        raise InvalidInputError(f"activations must be finite, got {amax}")
    return amax
