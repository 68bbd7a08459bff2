"""Other criteria for T: max, percentile, mse. They take the same arguments as :func:`klquant.optimal_threshold`.

All take ``(hist, edges)`` and return a :class:`klquant.Threshold`. The mse criterion folds the histogram to |x| and
sums it from the outside inwards. Let n(b) be the number of values in bin b or beyond, s(b) the sum of these values,
and b_q the first bin that is rounded to level q. Then::

    sum h (x - q(x) step)^2 = sum h x^2 - 2 step sum_q s(b_q) + step^2 sum_q (2 q - 1) n(b_q)

So the error of a candidate needs one look-up for each level, and no sum over the bins. The levels are summed in blocks,
so that memory grows with the number of bins only.
"""

import functools
from types import ModuleType
from typing import Any

import numpy as np

from klquant._namespace import Array, add_up, compiled, first_true, is_concrete, map_batch, scalar_argument
from klquant._result import Threshold, check_found, describe
from klquant._validate import check_inputs, check_number, is_sound
from klquant.errors import InvalidInputError

BLOCK_SIZE = 2**19  # entries of the temporary arrays of the squared errors
TIE = 1e-13  # of the mean square: squared errors closer than this differ by rounding only, and the first wins


def max_threshold(
    hist: Array,
    edges: Array,
    *,
    num_quantized_bins: int | None = None,
    num_bits: int | None = None,
    skip_zeros: bool = False,
) -> Threshold:
    """Return the largest observed value: T is the outer edge of the outermost non-empty bin.

    Parameters
    ----------
    hist, edges, num_quantized_bins, num_bits, skip_zeros
        As for :func:`klquant.optimal_threshold`, but 3 bins are enough.

    Returns
    -------
    Threshold
        Nothing is clipped. `index` is -1 and `divergence` is NaN.

    Raises
    ------
    InfeasibleError
        If a histogram is empty.
    InvalidInputError, ArrayTypeError
        As for :func:`klquant.optimal_threshold`.

    Examples
    --------
    >>> import numpy as np, klquant
    >>> float(klquant.max_threshold(np.array([0, 4, 9, 4, 1, 0, 0]), np.linspace(-7, 7, 8), num_quantized_bins=3))
    5.0
    """
    levels: dict[str, Any] = {"num_quantized_bins": num_quantized_bins, "num_bits": num_bits}
    return percentile_threshold(hist, edges, percentile=100.0, skip_zeros=skip_zeros, **levels)


def percentile_threshold(
    hist: Array,
    edges: Array,
    *,
    percentile: float = 99.99,
    num_quantized_bins: int | None = None,
    num_bits: int | None = None,
    skip_zeros: bool = False,
) -> Threshold:
    """Return the T that `percentile` percent of the absolute values do not exceed.

    T is interpolated linearly inside its bin.

    Parameters
    ----------
    hist, edges, num_quantized_bins, num_bits, skip_zeros
        As for :func:`klquant.optimal_threshold`, but 3 bins are enough.
    percentile : float, above 0 and at most 100
        May be traced by JAX.

    Returns
    -------
    Threshold
        `index` is -1 and `divergence` is NaN.

    Raises
    ------
    InfeasibleError
        If a histogram is empty.
    InvalidInputError, ArrayTypeError
        If `percentile` is out of range; otherwise as for :func:`klquant.optimal_threshold`.

    Examples
    --------
    >>> import numpy as np, klquant
    >>> hist, edges = np.array([1, 1, 0, 1, 1]), np.linspace(-5, 5, 6)
    >>> float(klquant.percentile_threshold(hist, edges, percentile=75, num_quantized_bins=3))
    4.0
    """
    hist, levels = check_inputs(hist, edges, num_quantized_bins, num_bits, skip_zeros, fewest=3)
    percent = check_number("percentile", percentile)
    if is_concrete(percent) and not 0 < percent <= 100:
        raise InvalidInputError(f"`percentile` must be above 0 and at most 100, got {percentile}")
    found = _percentile(hist, edges, scalar_argument("percentile", percent / 100, hist=hist), num_quantized_bins=levels)
    return check_found(found, "counts, got an empty histogram")


def mse_threshold(
    hist: Array,
    edges: Array,
    *,
    num_quantized_bins: int | None = None,
    num_bits: int | None = None,
    skip_zeros: bool = False,
) -> Threshold:
    """Return the edge T with the smallest expected squared error of rounding and clipping.

    Parameters
    ----------
    hist, edges, num_quantized_bins, num_bits, skip_zeros
        As for :func:`klquant.optimal_threshold`; the bins must have equal widths.

    Returns
    -------
    Threshold
        `value` is one of the edges. `index` counts the positive edges, from the narrowest. `divergence` is NaN.

    Raises
    ------
    InfeasibleError
        If a histogram is empty.
    InvalidInputError, ArrayTypeError
        If the bins have different widths; otherwise as for :func:`klquant.optimal_threshold`.

    Examples
    --------
    >>> import numpy as np, klquant
    >>> hist, edges = klquant.histogram(np.random.default_rng(0).laplace(size=100_000), num_bins=2001)
    >>> print(f"{klquant.mse_threshold(hist, edges).value:.3f} of {edges[-1]:.3f}")
    10.145 of 11.949
    """
    hist, levels = check_inputs(hist, edges, num_quantized_bins, num_bits, skip_zeros)
    _check_equal_bins(edges)
    found = _mse_search(hist, edges, num_quantized_bins=levels)
    return check_found(found, "counts, got an empty histogram")


def mse_curve(
    hist: Array,
    edges: Array,
    *,
    num_quantized_bins: int | None = None,
    num_bits: int | None = None,
    skip_zeros: bool = False,
) -> Array:
    """Return the expected squared error of rounding and clipping for every positive edge as T.

    All values of a bin are taken to lie at its centre.

    Parameters
    ----------
    hist, edges, num_quantized_bins, num_bits, skip_zeros
        As for :func:`klquant.optimal_threshold`; the bins must have equal widths.

    Returns
    -------
    array, shape (..., num_bins // 2 + 1), float64, in squared units of the edges
        NaN for an empty histogram.

    Raises
    ------
    InvalidInputError, ArrayTypeError
        If the bins have different widths; otherwise as for :func:`klquant.optimal_threshold`.

    Notes
    -----
    The values are exact to the rounding of float64, relative to the mean square. They take about
    ``num_bins * num_quantized_bins / 2`` additions.

    Examples
    --------
    >>> import numpy as np, klquant
    >>> klquant.mse_curve(np.array([1, 2, 0, 2, 1]), np.linspace(-5, 5, 6), num_quantized_bins=3).tolist()
    [3.6666666666666665, 1.0, 3.0]
    """
    hist, levels = check_inputs(hist, edges, num_quantized_bins, num_bits, skip_zeros)
    _check_equal_bins(edges)
    return _mse_errors(hist, edges, num_quantized_bins=levels)


def _check_equal_bins(edges: Array) -> None:
    if is_concrete(edges):
        bounds = np.asarray(edges, dtype=np.float64)
        drift = np.abs(np.diff(bounds) * (bounds.shape[-1] - 1) / (bounds[..., -1:] - bounds[..., :1]) - 1).max()
        if drift > 1e-2:
            raise InvalidInputError(
                f"`edges` must be equally spaced for the mse criterion, got widths up to {drift:.1%} off the mean"
            )


@functools.partial(compiled, by_row=True)
def _percentile(hist: Array, edges: Array, share: Array, *, xp: ModuleType, num_quantized_bins: int) -> Threshold:
    def one(hist: Array, edges: Array) -> Threshold:
        folded, outer = _fold(hist, xp=xp), edges.astype(xp.float64)[edges.shape[0] // 2 :]
        below = xp.cumsum(folded)
        target = xp.abs(share.astype(xp.float64) * below[-1])  # abs: or XLA may fuse the product into `below - target`
        k = first_true(below >= target, xp=xp)
        inner = xp.where(k == 0, 0.0, outer[k - 1])
        value = outer[k] - xp.abs((below[k] - target) / folded[k] * (outer[k] - inner))
        sound = is_sound(hist, edges, xp=xp) & (share > 0) & (share <= 1)
        value = xp.where(sound & (below[-1] > 0), value, xp.nan)
        nothing = xp.asarray(-1), xp.asarray(xp.nan, xp.float64)
        return describe(hist, edges, value, *nothing, num_quantized_bins=num_quantized_bins, xp=xp)

    return map_batch(one, hist, edges, xp=xp)


@functools.partial(compiled, by_row=True)
def _mse_search(hist: Array, edges: Array, *, xp: ModuleType, num_quantized_bins: int) -> Threshold:
    def one(hist: Array, edges: Array) -> Threshold:
        errors = _squared_errors(hist, edges, num_quantized_bins, xp=xp)
        centres = (edges[1:] + edges[:-1]).astype(xp.float64) / 2
        square = (hist.astype(xp.float64) * centres**2).sum() / hist.astype(xp.float64).sum()
        index = xp.where(xp.isnan(errors[0]), -1, first_true(errors <= errors.min() + TIE * square, xp=xp))
        value = xp.where(index < 0, xp.nan, edges[edges.shape[0] // 2 + index])
        return describe(
            hist, edges, value, index, xp.asarray(xp.nan, xp.float64), num_quantized_bins=num_quantized_bins, xp=xp
        )

    return map_batch(one, hist, edges, xp=xp)


@functools.partial(compiled, by_row=True)
def _mse_errors(hist: Array, edges: Array, *, xp: ModuleType, num_quantized_bins: int) -> Array:
    return map_batch(lambda h, e: _squared_errors(h, e, num_quantized_bins, xp=xp), hist, edges, xp=xp)


def _squared_errors(hist: Array, edges: Array, num_quantized_bins: int, *, xp: ModuleType) -> Array:
    folded = _fold(hist, xp=xp)
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

    weighted, sums = add_up(add, -(-qmax // rows), xp.zeros_like(folded), xp=xp)
    step = (xp.arange(num) + 0.5) / qmax
    squared = (folded * distance**2).sum() - 2 * step * sums + step**2 * weighted
    width = (edges[-1] - edges[0]).astype(xp.float64) / hist.shape[0]
    errors = xp.maximum(squared, 0.0) / folded.sum() * width**2
    return xp.where(is_sound(hist, edges, xp=xp), errors, xp.nan)


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


def _fold(hist: Array, *, xp: ModuleType) -> Array:
    """Return the counts by distance from the centre bin, float64, shape (num_bins // 2 + 1,)."""
    counts, centre = hist.astype(xp.float64), hist.shape[-1] // 2
    return xp.concatenate([counts[centre : centre + 1], counts[centre + 1 :] + counts[centre - 1 :: -1]])
