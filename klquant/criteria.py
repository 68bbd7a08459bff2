"""Other criteria for T: max, percentile, mse. They take the same arguments as :func:`klquant.optimal_threshold`.

All take ``(hist, edges)`` and return a :class:`klquant.Threshold`. ``_search/squared_errors.py`` has the formula of the
mse criterion.
"""

from types import ModuleType

from klquant._namespace import Array, compiled, first_true, map_batch
from klquant._result import Threshold, check_found, describe
from klquant._search.squared_errors import fold, least_error, squared_errors
from klquant._validate import check_equal_bins, check_histogram
from klquant.errors import InvalidInputError


def max_threshold(hist: Array, edges: Array, *, num_quantized_bins: int = 255) -> Threshold:
    """Return the largest observed value: T is the outer edge of the outermost non-empty bin.

    Parameters
    ----------
    hist, edges, num_quantized_bins
        As for :func:`klquant.optimal_threshold`.

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
    return percentile_threshold(hist, edges, percentile=100.0, num_quantized_bins=num_quantized_bins)


def percentile_threshold(
    hist: Array, edges: Array, *, percentile: float = 99.99, num_quantized_bins: int = 255
) -> Threshold:
    """Return the T that `percentile` percent of the absolute values do not exceed.

    T is interpolated linearly inside its bin.

    Parameters
    ----------
    hist, edges, num_quantized_bins
        As for :func:`klquant.optimal_threshold`.
    percentile : float, above 0 and at most 100

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
    check_histogram(hist, edges, num_quantized_bins)
    if not 0 < percentile <= 100:
        raise InvalidInputError(f"`percentile` must be above 0 and at most 100, got {percentile}")
    found = _percentile(hist, edges, percentile=float(percentile), num_quantized_bins=int(num_quantized_bins))
    return check_found(found, "counts, got an empty histogram")


def mse_threshold(hist: Array, edges: Array, *, num_quantized_bins: int = 255) -> Threshold:
    """Return the edge T with the smallest expected squared error of rounding and clipping.

    Parameters
    ----------
    hist, edges, num_quantized_bins
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
    check_histogram(hist, edges, num_quantized_bins)
    check_equal_bins(edges, "the mse criterion")
    found = _mse_search(hist, edges, num_quantized_bins=int(num_quantized_bins))
    return check_found(found, "counts, got an empty histogram")


def mse_curve(hist: Array, edges: Array, *, num_quantized_bins: int = 255) -> Array:
    """Return the expected squared error of rounding and clipping for every positive edge as T.

    All values of a bin are taken to lie at its centre.

    Parameters
    ----------
    hist, edges, num_quantized_bins
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
    check_histogram(hist, edges, num_quantized_bins)
    check_equal_bins(edges, "the mse criterion")
    return _mse_errors(hist, edges, num_quantized_bins=int(num_quantized_bins))


@compiled
def _percentile(hist: Array, edges: Array, *, xp: ModuleType, percentile: float, num_quantized_bins: int) -> Threshold:
    def one(hist: Array, edges: Array) -> Threshold:
        folded, outer = fold(hist, xp=xp), edges.astype(xp.float64)[edges.shape[0] // 2 :]
        below = xp.cumsum(folded)
        target = xp.abs(percentile / 100 * below[-1])  # abs: or XLA may fuse the product into `below - target`
        k = first_true(below >= target, xp=xp)
        inner = xp.where(k == 0, 0.0, outer[k - 1])
        value = outer[k] - xp.abs((below[k] - target) / folded[k] * (outer[k] - inner))
        value = xp.where(below[-1] > 0, value, xp.nan)
        nothing = xp.asarray(-1), xp.asarray(xp.nan)
        return describe(hist, edges, value, *nothing, num_quantized_bins=num_quantized_bins, xp=xp)

    return map_batch(one, hist, edges, xp=xp)


@compiled
def _mse_search(hist: Array, edges: Array, *, xp: ModuleType, num_quantized_bins: int) -> Threshold:
    def one(hist: Array, edges: Array) -> Threshold:
        errors = squared_errors(hist, edges, num_quantized_bins, xp=xp)
        index = xp.where(xp.isnan(errors[0]), -1, least_error(errors, hist, edges, xp=xp))
        value = xp.where(index < 0, xp.nan, edges[edges.shape[0] // 2 + index])
        return describe(hist, edges, value, index, xp.asarray(xp.nan), num_quantized_bins=num_quantized_bins, xp=xp)

    return map_batch(one, hist, edges, xp=xp)


@compiled
def _mse_errors(hist: Array, edges: Array, *, xp: ModuleType, num_quantized_bins: int) -> Array:
    return map_batch(lambda h, e: squared_errors(h, e, num_quantized_bins, xp=xp), hist, edges, xp=xp)
