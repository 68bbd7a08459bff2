"""Other criteria for T: max, percentile, mse. They take the same arguments as :func:`klquant.optimal_threshold`.

All take ``(hist, edges)`` and return a :class:`klquant.Threshold`. ``_search/squared_errors.py`` has the formula of the
mse criterion.
"""

import functools
from types import ModuleType
from typing import Any

from klquant._namespace import Array, compiled, first_true, in_float64, is_concrete, map_batch, scalar_argument
from klquant._result import Threshold, check_found, describe
from klquant._search.prefix_sums import fold
from klquant._search.squared_errors import least_error, squared_errors
from klquant._validate import check_equal_bins, check_inputs, check_number, is_sound
from klquant.errors import InvalidInputError


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
    check_equal_bins(edges, "the mse criterion")
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
    check_equal_bins(edges, "the mse criterion")
    return _mse_errors(hist, edges, num_quantized_bins=levels)


@functools.partial(compiled, by_row=True)
def _percentile(hist: Array, edges: Array, share: Array, *, xp: ModuleType, num_quantized_bins: int) -> Threshold:
    def one(hist: Array, edges: Array) -> Threshold:
        folded = fold(hist.astype(xp.float64), xp=xp)
        outer = in_float64(edges, xp=xp).astype(xp.float64)[edges.shape[0] // 2 :]
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
        errors = squared_errors(hist, edges, num_quantized_bins, xp=xp)
        index = xp.where(xp.isnan(errors[0]), -1, least_error(errors, hist, edges, xp=xp))
        value = xp.where(index < 0, xp.nan, edges[edges.shape[0] // 2 + index])
        return describe(
            hist, edges, value, index, xp.asarray(xp.nan, xp.float64), num_quantized_bins=num_quantized_bins, xp=xp
        )

    return map_batch(one, hist, edges, xp=xp)


@functools.partial(compiled, by_row=True)
def _mse_errors(hist: Array, edges: Array, *, xp: ModuleType, num_quantized_bins: int) -> Array:
    return map_batch(lambda h, e: squared_errors(h, e, num_quantized_bins, xp=xp), hist, edges, xp=xp)
