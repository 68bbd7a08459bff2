"""Every candidate's window in numbers: what its ends hold, what smoothing costs, what its outer groups become.

All of it is O(1) a candidate, from running sums over the bins. They are sums of int64, and differences are taken
before they become floating point, so that a bin of 2**61 does not swallow the tail behind it.
"""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

from klquant._namespace import Array, running_sums, slice_at

REST_BITS = 46  # so that the sum over 2**16 bins stays below 2**62


class Sums(NamedTuple):
    """Running sums over the bins, from 0 to the total and on for some padding."""

    counts: Array
    """Of the counts in units, int64."""
    filled: Array
    """Of the bins that are not empty, int64."""
    rest: Array | None
    """Of what the units leave of weights, in 2**-REST_BITS units, int64; None for counts."""
    unit: Array | None
    """What a unit of weights is worth, a power of two; None for counts, where it is 1."""


def sum_up(hist: Array, padding: int, *, xp: ModuleType) -> Sums:
    """Return the running sums of a histogram; those of weights are exact to 2**-108 of the total."""
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
    """Return differences of running sums as float64, given that of the counts and how to take that of the rest."""
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
    """Return counts and filled bins of [x, x + size) for `number` consecutive x from `base` on, float64."""

    def sliding(running: Array) -> Array:
        return slice_at(running, base + size, number, xp=xp) - slice_at(running, base, number, xp=xp)

    return _value(sums, sliding(sums.counts), sliding, xp=xp), sliding(sums.filled).astype(xp.float64)


def filled_between(sums: Sums, low: Array, high: Array) -> Array:
    """Return how many of the bins low <= k < high are not empty, int64."""
    return sums.filled[high] - sums.filled[low]
