"""The expected squared error of rounding and clipping, for every positive edge as T.

The histogram is folded to |x| and summed from the outside inwards. Let n(b) be the number of values in bin b or beyond,
s(b) the sum of these values, and b_q the first bin that is rounded to level q. Then::

    sum h (x - q(x) step)^2 = sum h x^2 - 2 step sum_q s(b_q) + step^2 sum_q (2 q - 1) n(b_q)

So the error of a candidate needs one look-up for each level, and no sum over the bins.
"""

import functools
from types import ModuleType
from typing import Any

import numpy as np

from klquant._namespace import Array, first_true

TIE = 1e-13  # of the mean square: squared errors closer than this differ by rounding only, and the first wins


def squared_errors(hist: Array, edges: Array, num_quantized_bins: int, *, xp: ModuleType) -> Array:
    """Return the mean squared error for every positive edge as T; NaN for an empty histogram."""
    folded = fold(hist, xp=xp)
    num, qmax = folded.shape[0], num_quantized_bins // 2
    distance = xp.arange(num).astype(xp.float64)  # in bins
    from_outside = [xp.concatenate([xp.cumsum(v[::-1])[::-1], xp.zeros(1)]) for v in (folded, folded * distance)]
    begin = xp.asarray(_level_begins(num, qmax))
    counts, sums = (total[begin] for total in from_outside)  # (qmax, candidates)
    step = (xp.arange(num) + 0.5) / qmax
    odd = 2.0 * xp.arange(1, qmax + 1) - 1
    squared = (folded * distance**2).sum() - 2 * step * sums.sum(axis=0) + step**2 * (odd @ counts)
    width = (edges[-1] - edges[0]).astype(xp.float64) / hist.shape[0]
    return xp.maximum(squared, 0.0) / folded.sum() * width**2


@functools.lru_cache(maxsize=32)
def _level_begins(num: int, qmax: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Return the first bin (by distance from 0) that rounds to level q, for q = 1 .. qmax and each candidate T."""
    halves = (2 * np.arange(1, qmax + 1)[:, None] - 1) * (2 * np.arange(num) + 1)  # (q - 1/2) T, unit 1 / (4 qmax) bins
    begins: np.ndarray[Any, np.dtype[np.int64]] = np.minimum(-(-halves // (4 * qmax)), num)
    return begins


def fold(hist: Array, *, xp: ModuleType) -> Array:
    """Return the counts by distance from the centre bin, float64, shape (num_bins // 2 + 1,)."""
    counts, centre = hist.astype(xp.float64), hist.shape[-1] // 2
    return xp.concatenate([counts[centre : centre + 1], counts[centre + 1 :] + counts[centre - 1 :: -1]])


def least_error(errors: Array, hist: Array, edges: Array, *, xp: ModuleType) -> Array:
    """Return the index of the first least error, up to rounding."""
    centres = (edges[1:] + edges[:-1]).astype(xp.float64) / 2
    square = (hist * centres**2).sum() / hist.astype(xp.float64).sum()
    return first_true(errors <= errors.min() + TIE * square, xp=xp)
