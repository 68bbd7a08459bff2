"""The merge partition: how the bins of a candidate window fall into quantized bins, and what they become."""

from types import ModuleType

import numpy as np

from klquant._namespace import Array, array_namespace, compiled
from klquant._validate import check_odd, check_vector
from klquant.errors import ArrayTypeError, InvalidInputError


def merge_partition(num_bins: int, num_quantized_bins: int = 255) -> Array:
    """Return the boundaries of the groups into which `num_bins` bins are merged.

    Group j holds the bins ``bounds[j] <= k < bounds[j + 1]``. All groups hold ``num_bins // num_quantized_bins``
    bins but the last, which also takes the remainder: every bin is in exactly one group.

    Parameters
    ----------
    num_bins : int, at least `num_quantized_bins`
    num_quantized_bins : int, odd, at least 3

    Returns
    -------
    NumPy array, shape (num_quantized_bins + 1,), int64, increasing from 0 to `num_bins`

    Raises
    ------
    InvalidInputError, ArrayTypeError
        For fewer bins than levels, an even number of levels, or no integers.

    Notes
    -----
    Source: S. Migacz, "8-bit inference with TensorRT", GTC 2017, slides 37-39.

    Examples
    --------
    >>> import klquant
    >>> klquant.merge_partition(11, 5).tolist()
    [0, 2, 4, 6, 8, 11]
    """
    check_odd("num_quantized_bins", num_quantized_bins)
    if isinstance(num_bins, bool) or not isinstance(num_bins, (int, np.integer)):
        raise ArrayTypeError(f"`num_bins` must be an int, got {type(num_bins).__name__}")
    if num_bins < num_quantized_bins:
        raise InvalidInputError(
            f"`num_bins` must be at least num_quantized_bins = {num_quantized_bins}, got {num_bins}"
        )
    return merge_bounds(np.asarray([num_bins]), num_quantized_bins, xp=np)[0]


def quantized_distribution(values: Array, support: Array, *, num_quantized_bins: int = 255) -> Array:
    """Return what is left of `values` when each group of bins keeps only its total.

    The total of a group is spread evenly over those of its bins where `support` is not zero.

    Parameters
    ----------
    values : array, shape (n,), counts or weights >= 0
        The sliced histogram S of a candidate.
    support : array, shape (n,), counts or weights >= 0
        The reference distribution P of the candidate; only where it is zero matters.
    num_quantized_bins : int, odd, at least 3 and at most n

    Returns
    -------
    array, shape (n,), float64, in the library of `values`
        Mass is kept in every group that has support.

    Raises
    ------
    InvalidInputError, ArrayTypeError
        For NaN, infinity, negative entries, unequal shapes, too few bins; for mixed libraries.

    Examples
    --------
    >>> import numpy as np, klquant
    >>> hist = np.array([2, 4, 0, 3, 5, 5, 1])
    >>> klquant.quantized_distribution(hist, hist, num_quantized_bins=3).tolist()
    [3.0, 3.0, 0.0, 3.0, 3.6666666666666665, 3.6666666666666665, 3.6666666666666665]
    """
    array_namespace(values=values, support=support)
    check_vector("values", values)
    check_vector("support", support)
    if values.shape != support.shape:
        raise InvalidInputError(
            f"`values` and `support` must have the same shape, got {tuple(values.shape)} and {tuple(support.shape)}"
        )
    merge_partition(values.shape[0], num_quantized_bins)  # checks the numbers
    return _quantized_distribution(values, support, num_quantized_bins=int(num_quantized_bins))


def merge_bounds(width: Array, num_quantized_bins: int, *, xp: ModuleType) -> Array:
    """Return the group boundaries for every width, shape (*width.shape, num_quantized_bins + 1)."""
    bounds = (width // num_quantized_bins)[..., None] * xp.arange(num_quantized_bins)
    return xp.concatenate([bounds, width[..., None]], axis=-1)


def prefix_sums(values: Array, *, xp: ModuleType) -> tuple[Array, Array]:
    """Return running sums of the whole and of the fractional parts, each of shape (n + 1,).

    Whole parts are summed in int64, so that counts stay exact up to a total of 2**63 - 1: in float64 a
    bin of 2**61 would swallow the tail behind it.
    """
    if values.dtype.kind == "f":
        whole = xp.floor(values)
        parts = whole.astype(xp.int64), (values - whole).astype(xp.float64)
    else:
        parts = values.astype(xp.int64), xp.zeros(values.shape, xp.float64)
    whole, fraction = (xp.concatenate([xp.zeros(1, part.dtype), xp.cumsum(part)]) for part in parts)
    return whole, fraction


def sum_between(prefix: tuple[Array, Array], low: Array, high: Array, *, xp: ModuleType) -> Array:
    """Return the sums over low <= k < high, float64, from :func:`prefix_sums`; the difference is taken exactly."""
    whole, fraction = prefix
    return (whole[high] - whole[low]).astype(xp.float64) + (fraction[high] - fraction[low])


@compiled
def _quantized_distribution(values: Array, support: Array, *, xp: ModuleType, num_quantized_bins: int) -> Array:
    num_bins = values.shape[0]
    bounds = merge_bounds(xp.asarray(num_bins), num_quantized_bins, xp=xp)
    total = sum_between(prefix_sums(values, xp=xp), bounds[:-1], bounds[1:], xp=xp)
    count = sum_between(prefix_sums(support > 0, xp=xp), bounds[:-1], bounds[1:], xp=xp)
    group = xp.minimum(xp.arange(num_bins) // (num_bins // num_quantized_bins), num_quantized_bins - 1)
    return xp.where(support > 0, (total / xp.maximum(count, 1))[group], 0.0)
