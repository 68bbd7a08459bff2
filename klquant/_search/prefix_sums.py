"""Running sums over the bins: A, M and N of any range in O(1).

The sum over low <= k < high is ``running[high] - running[low]``. The running sums are int64, and the difference is
taken before it becomes float64. So counts are exact: a small tail behind a bin of 2**61 keeps all its digits, where
float64 sums would have lost it. The one rounding of the conversion is 2**-53 of the result, not of the total.
"""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

from klquant._namespace import Array, running_sums, slice_at

REST_BITS = 46  # the sum over 2**16 bins stays below 2**62


class Sums(NamedTuple):
    """Running sums over the bins, from 0 to the total, then padded with the total."""

    counts: Array
    """The sums of the counts, in units, int64."""
    filled: Array
    """The number of non-empty bins, int64."""
    rest: Array | None
    """The sums of the fractions of a unit, in 2**-REST_BITS units, int64; None for counts."""
    unit: Array | None
    """The weight of one unit, a power of two; None for counts, whose unit is 1."""


def sum_up(hist: Array, padding: int, *, xp: ModuleType) -> Sums:
    """Return the running sums of a histogram.

    Weights become fixed-point numbers of two int64 words: whole units, of which the total has at most 2**62, and
    46 bits of the fraction. So each weight is rounded once, to 2**-108 of the total, and every sum is exact after that.
    """
    rest, unit = None, None
    filled, counts = (hist > 0).astype(xp.int64), hist
    if hist.dtype.kind not in "iub":
        weights = hist.astype(xp.float64)
        exponent = xp.maximum(xp.frexp(weights.sum())[1], -900)
        unit = xp.ldexp(xp.asarray(1.0), exponent - 62)
        scaled = xp.ldexp(weights, 62 - exponent)
        counts = xp.floor(scaled)
        rest = xp.rint(xp.ldexp(scaled - counts, REST_BITS)).astype(xp.int64)
    columns = (counts.astype(xp.int64), filled) if rest is None else (counts.astype(xp.int64), filled, rest)
    zero = xp.zeros(1, xp.int64)
    padded = [xp.concatenate([zero, sums, xp.repeat(sums[-1:], padding)]) for sums in running_sums(columns, xp=xp)]
    return Sums(padded[0], padded[1], None if rest is None else padded[2], unit)


def _value(sums: Sums, counts: Array, rest: Callable[[Array], Array], *, xp: ModuleType) -> Array:
    """Return a difference of running sums in float64: that of the units, and that of the fractions from `rest`."""
    value = counts.astype(xp.float64)
    if sums.rest is None:
        return value
    return value * sums.unit + xp.ldexp(rest(sums.rest).astype(xp.float64), -REST_BITS) * sums.unit


def counts_between(sums: Sums, low: Array, high: Array, *, xp: ModuleType) -> Array:
    """Return the sums over low <= k < high, float64."""

    def between(running: Array) -> Array:
        return running[high] - running[low]

    return _value(sums, between(sums.counts), between, xp=xp)


def sliding_windows(sums: Sums, base: Array, size: Array, number: int, *, xp: ModuleType) -> tuple[Array, Array]:
    """Return the counts and the number of non-empty bins in [x, x + size), for `number` values of x from `base` on."""

    def sliding(running: Array) -> Array:
        return slice_at(running, base + size, number, xp=xp) - slice_at(running, base, number, xp=xp)

    return _value(sums, sliding(sums.counts), sliding, xp=xp), sliding(sums.filled).astype(xp.float64)


def filled_between(sums: Sums, low: Array, high: Array) -> Array:
    """Return the number of non-empty bins in low <= k < high, int64."""
    return sums.filled[high] - sums.filled[low]
