"""The expected squared error of rounding and clipping, for every positive edge as T.

The histogram is folded to |x| and summed from the outside inwards. Let n(b) be the number of values in bin b or beyond,
s(b) the sum of these values, and b_q the first bin that is rounded to level q. Then::

    sum h (x - q(x) step)^2 = sum h x^2 - 2 step sum_q s(b_q) + step^2 sum_q (2 q - 1) n(b_q)

So the error of a candidate needs one look-up for each level, and no sum over the bins. The levels are summed in blocks,
so that memory grows with the number of bins only.
"""

import functools
from types import ModuleType
from typing import Any

import numpy as np

from klquant._namespace import Array, first_true, in_float64, repeat
from klquant._search.prefix_sums import fold
from klquant._validate import has_equal_bins, is_sound

BLOCK_SIZE = 2**19  # entries of the temporary arrays of the squared errors
TIE = 1e-13  # of the mean square: squared errors closer than this differ by rounding only, and the first wins


def squared_errors(hist: Array, edges: Array, num_quantized_bins: int, *, xp: ModuleType) -> Array:
    """Return the mean squared error for every positive edge as T; NaN for one that is empty or not sound."""
    folded = fold(hist.astype(xp.float64), xp=xp)
    num, qmax = folded.shape[0], num_quantized_bins // 2
    distance = xp.arange(num).astype(xp.float64)  # in bins
    from_outside = [xp.concatenate([xp.cumsum(v[::-1])[::-1], xp.zeros(1)]) for v in (folded, folded * distance)]
    rows = min(qmax, max(1, BLOCK_SIZE // num))

    def add(block: Array, totals: tuple[Array, Array]) -> tuple[Array, Array]:
        level = block * rows + xp.arange(1, rows + 1)
        counted = (level <= qmax).astype(xp.float64)  # a last block reaches beyond
        begins = xp.asarray(_all_begins(num, qmax)) if rows == qmax else _begins(level, num, qmax, xp=xp)
        counts, sums = (total[begins] for total in from_outside)  # (rows, candidates)
        return totals[0] + (counted * (2 * level - 1)) @ counts, totals[1] + counted @ sums

    weighted, sums = repeat(add, -(-qmax // rows), (xp.zeros_like(folded),) * 2, xp=xp)
    step = (xp.arange(num) + 0.5) / qmax
    squared = (folded * distance**2).sum() - 2 * step * sums + step**2 * weighted
    bounds = in_float64(edges, xp=xp).astype(xp.float64)
    width = (bounds[-1] - bounds[0]) / hist.shape[0]
    errors = xp.maximum(squared, 0.0) / folded.sum() * width**2
    return xp.where(is_sound(hist, edges, xp=xp) & has_equal_bins(edges, xp=xp), errors, xp.nan)


def _begins(level: Array, num: int, qmax: int, *, xp: ModuleType) -> Array:
    """Return the first bin (by distance from 0) that rounds to each level q, for each candidate T.

    The limit between two levels is (q - 1/2) T / qmax, where T is an odd number of half bins.
    """
    halves = (2 * level[:, None] - 1) * (2 * xp.arange(num) + 1)  # in units of 1 / (4 qmax) bins
    return xp.minimum((halves + (4 * qmax - 1)) // (4 * qmax), num)


@functools.lru_cache(maxsize=8)
def _all_begins(num: int, qmax: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
    begins: np.ndarray[Any, np.dtype[np.int64]] = _begins(np.arange(1, qmax + 1), num, qmax, xp=np)
    return begins


def least_error(errors: Array, hist: Array, edges: Array, *, xp: ModuleType) -> Array:
    """Return the index of the first least error, up to rounding."""
    bounds = in_float64(edges, xp=xp).astype(xp.float64)
    centres = (bounds[1:] + bounds[:-1]) / 2
    square = (hist.astype(xp.float64) * centres**2).sum() / hist.astype(xp.float64).sum()
    return first_true(errors <= errors.min() + TIE * square, xp=xp)
