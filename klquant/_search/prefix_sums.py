"""Running sums over the bins: A, M and N of any range in O(1).

The sum over low <= k < high is ``running[high] - running[low]``. The running sums are int64, and the difference is
taken before it becomes float64. So counts are exact: a small tail behind a bin of 2**61 keeps all its digits, where
float64 sums would have lost it. The one rounding of the conversion is 2**-53 of the result, not of the total.
"""

from types import ModuleType
from typing import NamedTuple

import numpy as np

from klquant._namespace import Array, binary_exponent, power_of_two, running_sums, slice_at

REST_BITS = 46  # the sum over 2**16 bins stays below 2**62


class Sums(NamedTuple):
    """Running sums over the bins, from 0 to the total, then padded with the total."""

    table: Array
    """int64, a row for each sum: the counts, in units; the number of non-empty bins; and, for weights, the fractions of
    a unit, in 2**-REST_BITS units."""
    unit: Array | None
    """The weight of one unit, a power of two. None: the table holds the counts themselves, in float64."""

    @property
    def filled(self) -> Array:
        """Return the number of non-empty bins before each bin."""
        return self.table[1]


def fold(table: Array, *, xp: ModuleType) -> Array:
    """Return the sums of the entries at each distance from the centre of the last axis, from 0 on."""
    centre = table.shape[-1] // 2
    return xp.concatenate(
        [table[..., centre : centre + 1], table[..., centre + 1 :] + table[..., centre - 1 :: -1]], axis=-1
    )


def sum_up(hist: Array, padding: int, *, xp: ModuleType) -> Sums:
    """Return the running sums of a histogram.

    Weights become fixed-point numbers of two int64 words: whole units, of which the total has at most 2**62, and
    46 bits of the fraction. So each weight is rounded once, to 2**-108 of the total, and every sum is exact after that.
    """
    unit, filled, counts, fractions = 1.0, (hist > 0).astype(xp.int64), hist, []
    if hist.dtype.kind not in "iub":
        weights = hist.astype(xp.float64)
        exponent = xp.maximum(binary_exponent(weights.sum(), xp=xp), -900)
        unit = power_of_two(exponent - 62, xp=xp)
        scaled = weights * power_of_two(62 - exponent, xp=xp)
        counts = xp.floor(scaled)
        fractions = [xp.rint((scaled - counts) * 2.0**REST_BITS).astype(xp.int64)]
    rows = xp.stack([counts.astype(xp.int64), filled, *fractions])
    return Sums(running_sums(rows, padding, xp=xp), unit)


def scaled(sums: Sums, factor: Array, *, xp: ModuleType) -> Sums:
    """Return the sums with all counts multiplied by a power of two. NumPy computes in float64 where that is exact."""
    if xp is np and len(sums.table) == 2 and sums.table[0, -1] <= 2**53:
        table = sums.table.astype(np.float64)
        table[0] *= factor
        return Sums(table, None)
    return sums._replace(unit=sums.unit * factor)


def counted(sums: Sums, difference: Array) -> tuple[Array, Array]:
    """Return the counts, float64, and the number of non-empty bins of some differences of running sums."""
    if sums.unit is None:
        return difference[0], difference[1]
    counts = difference[0] * sums.unit
    if len(difference) > 2:
        counts = counts + difference[2] * (2.0**-REST_BITS * sums.unit)
    return counts, difference[1]


def between(sums: Sums, low: Array, high: Array, *, xp: ModuleType) -> tuple[Array, Array]:
    """Return the sums and the numbers of non-empty bins over low <= k < high."""
    low, high = xp.broadcast_arrays(low, high)
    end, begin = (sums.table.take(bins, axis=1, mode="clip") for bins in (high, low))  # NumPy's indexing is slow
    return counted(sums, end - begin)


def counts_between(sums: Sums, low: Array, high: Array, *, xp: ModuleType) -> Array:
    """Return the sums over low <= k < high, float64."""
    return between(sums, low, high, xp=xp)[0]


def sliding_windows(sums: Sums, base: Array, size: Array, number: int, *, xp: ModuleType) -> tuple[Array, Array]:
    """Return the counts and the number of non-empty bins in [x, x + size), for `number` values of x from `base` on."""
    end, begin = (slice_at(sums.table, position, number, xp=xp) for position in (base + size, base))
    return counted(sums, end - begin)


def filled_between(sums: Sums, low: Array, high: Array) -> Array:
    """Return the number of non-empty bins in low <= k < high, int64."""
    return sums.filled[high] - sums.filled[low]
