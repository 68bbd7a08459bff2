"""The bins that a pass counts in, and counting on the host.

A single pass does not know the range before it counts. Its histograms have a level k and lie over [-3**k, 3**k]. When a
larger value arrives, bins are merged three by three, which keeps their number odd and their edges aligned. Such a
histogram has three times as many bins as the settings ask for: up to two thirds are cut off as empty at the end.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

import klquant

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


class Counted(NamedTuple):
    """One tensor in bins."""

    counts: Counts
    """Shape (num_bins,)."""
    zeros: int
    """How many values are exactly 0; the centre bin has more."""


BinsFor: TypeAlias = Callable[[str, float], Bins | None]
"""The bins to count a tensor in, by its name and largest absolute value; None if only its range is wanted."""


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


def extremes(values: Array) -> tuple[float, float]:
    """Return the smallest and the largest value; NaN if there is one, an empty range for none."""
    return (float(values.min()), float(values.max())) if values.size else (math.inf, -math.inf)


def count(values: Array, bins: Bins, ends: tuple[float, float] | None = None) -> Counted:
    """Count finite values on the host; what lies beyond the range goes to the end bins.

    Parameters
    ----------
    values : NumPy array of any shape, real
    bins : Bins
    ends : (float, float), optional
        Smallest and largest value, if they are known; else the values are read for them.

    Returns
    -------
    Counted

    Raises
    ------
    InvalidInputError
        For NaN or infinity.
    """
    if bins.level is None:
        found = _count_in_cache(values.reshape(-1), bins, ends)
        if found is not None:
            return found
    zeros = int(np.count_nonzero(values == 0))
    if bins.level is None:
        return Counted(klquant.histogram(values, num_bins=bins.num_bins, amax=bins.amax).hist, zeros)
    times, over = bins.half_bins
    total = np.zeros(bins.num_bins, np.int64)
    for part in np.split(values.reshape(-1), range(_CHUNK, values.size, _CHUNK)):
        single = np.clip(part.astype(np.float64), -_LARGEST, _LARGEST).astype(np.float32)
        scaled = single.astype(np.float64) * times / over
        total += klquant.histogram(scaled, num_bins=bins.num_bins, amax=float(bins.num_bins)).hist
    return Counted(total, zeros)


def _count_in_cache(values: Array, bins: Bins, ends: tuple[float, float] | None) -> Counted | None:
    """Count as :func:`klquant.histogram` does, but read the values once; None for what that refuses.

    Each step takes a chunk that stays in the cache: the whole tensor is read from memory once, and once for its ends.
    """
    limit, times = bins.num_bins, bins.num_bins / float(bins.amax) if bins.amax > 0 else math.inf
    if limit < 3 or limit % 2 == 0 or values.dtype.kind != "f" or not (values.size and 0 < times < math.inf):
        return None
    low, high = (end * times for end in ends or extremes(values))
    if not math.isfinite(high - low):
        return None
    size = min(_CHUNK, values.size)
    wide, is_zero = np.empty(size), np.empty(size, np.bool_)
    numbers = wide.view(np.int64)
    halves, zeros = np.zeros(2 * limit + 1, np.int64), 0
    first = 0 if low >= 0 else -limit
    for part in (values[begin : begin + size] for begin in range(0, values.size, size)):
        here = slice(part.size)
        np.copyto(wide[here], part)
        np.multiply(wide[here], times, out=wide[here])
        if low <= -limit - 1 or high >= limit + 1:
            np.clip(wide[here], -limit, limit, out=wide[here])
        numbers[here] = wide[here]  # rounds towards 0
        if first:
            np.subtract(numbers[here], first, out=numbers[here])
        halves[limit + first :] += np.bincount(numbers[here], minlength=limit - first + 1)
        zeros += int(np.count_nonzero(np.equal(part, 0, out=is_zero[here])))
    return Counted(join_halves(halves, limit), zeros)


def join_halves(halves: Counts, limit: int) -> Counts:
    """Join half bins -limit .. limit to bins: the centre has one, the others two, and the outermost a third."""
    sides = []
    for side in (halves[limit - 1 :: -1], halves[limit + 1 :]):  # by their distance from 0
        joined = side[:-1:2] + side[1::2]
        joined[-1] += side[-1]
        sides.append(joined)
    return np.concatenate([sides[0][::-1], halves[limit : limit + 1], sides[1]])


def widened(counts: Counts, steps: int) -> Counts:
    """Return the counts over a range that is wider by so many powers of three, in as many bins."""
    for _ in range(steps):
        counts = _merge_threes(counts)
    return counts


def _merge_threes(hist: Counts) -> Counts:
    """Merge bins three by three around the centre bin; the number of bins stays, and the outer ones are empty."""
    merged = 2 * ((len(hist) // 2 + 1) // 3) + 1  # bins that get counts
    margin = (3 * merged - len(hist)) // 2
    inner = np.pad(hist, margin).reshape(merged, 3).sum(axis=1)
    return np.pad(inner, (len(hist) - merged) // 2)


def to_histogram(counts: Counts, bins: Bins, amax: float) -> tuple[klquant.Histogram, int]:
    """Return counts with their edges; those of a single pass are cut to `amax`, with how many values lie outside."""
    if bins.level is None:
        return klquant.Histogram(counts, _edges(len(counts), bins.amax)), 0
    width = 2 * bins.amax / len(counts)
    half = min(max(math.ceil(amax / width - 0.5), len(counts) // 6), len(counts) // 2)
    cut = len(counts) // 2 - half
    kept = counts[cut : len(counts) - cut].copy()
    kept[0], kept[-1] = counts[: cut + 1].sum(), counts[len(counts) - cut - 1 :].sum()
    outside = int(counts[:cut].sum() + counts[len(counts) - cut :].sum())
    return klquant.Histogram(kept, _edges(len(kept), width * len(kept) / 2)), outside


def _edges(num_bins: int, amax: float) -> Array:
    edges: Array = klquant.histogram(np.zeros(0), num_bins=num_bins, amax=amax).edges
    return edges
