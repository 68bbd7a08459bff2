"""The merge partition: how the bins of a candidate window fall into quantized bins, and what they become."""

from types import ModuleType
from typing import Any

import numpy as np

from klquant._namespace import Array, array_namespace, compiled
from klquant._search.prefix_sums import counts_between, filled_between, sum_up
from klquant._validate import check_odd, check_vector
from klquant.errors import ArrayTypeError, InvalidInputError


def merge_partition(num_bins: int, *, num_quantized_bins: int = 255) -> Array:
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
    >>> klquant.merge_partition(11, num_quantized_bins=5).tolist()
    [0, 2, 4, 6, 8, 11]
    """
    check_odd("num_quantized_bins", num_quantized_bins)
    if isinstance(num_bins, bool) or not isinstance(num_bins, (int, np.integer)):
        raise ArrayTypeError(f"`num_bins` must be an int, got {type(num_bins).__name__}")
    if num_bins < num_quantized_bins:
        raise InvalidInputError(
            f"`num_bins` must be at least num_quantized_bins = {num_quantized_bins}, got {num_bins}"
        )
    return _bounds(int(num_bins), int(num_quantized_bins))


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
    merge_partition(values.shape[0], num_quantized_bins=num_quantized_bins)  # checks the numbers
    return _quantized_distribution(values, support, num_quantized_bins=int(num_quantized_bins))


def _bounds(num_bins: int, num_quantized_bins: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
    return np.append(num_bins // num_quantized_bins * np.arange(num_quantized_bins), num_bins)


@compiled
def _quantized_distribution(values: Array, support: Array, *, xp: ModuleType, num_quantized_bins: int) -> Array:
    bounds = _bounds(values.shape[0], num_quantized_bins)
    total = counts_between(sum_up(values, 0, xp=xp), bounds[:-1], bounds[1:], xp=xp)
    filled = filled_between(sum_up(support > 0, 0, xp=xp), bounds[:-1], bounds[1:])
    group = np.repeat(np.arange(num_quantized_bins), np.diff(bounds))
    return xp.where(support > 0, (total / xp.maximum(filled, 1))[group], 0.0)
