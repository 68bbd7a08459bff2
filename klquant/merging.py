"""The merge partition: how the bins of a window are merged into quantized bins, and the distribution Q that results."""

import functools
from types import ModuleType
from typing import Any

import numpy as np

from klquant._namespace import Array, array_namespace, compiled, in_float64
from klquant._search.prefix_sums import counts_between, filled_between, sum_up
from klquant._validate import check_int, check_odd, check_vector, is_sound
from klquant.errors import InvalidInputError


def merge_partition(num_bins: int, *, num_quantized_bins: int = 255) -> Array:
    """Return the boundaries of the groups into which `num_bins` bins are merged.

    Group j contains the bins ``bounds[j] <= k < bounds[j + 1]``. Each group has ``num_bins // num_quantized_bins``
    bins, and the last one also takes the remainder. So every bin is in exactly one group.

    Parameters
    ----------
    num_bins : int, at least `num_quantized_bins`
    num_quantized_bins : int, odd, at least 3

    Returns
    -------
    NumPy array, shape (num_quantized_bins + 1,), int64, increasing from 0 to `num_bins`

    Raises
    ------
    InvalidInputError
        If there are fewer bins than levels, or the number of levels is even or below 3.
    ArrayTypeError
        If a number is not an int.

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
    if check_int("num_bins", num_bins) < num_quantized_bins:
        raise InvalidInputError(
            f"`num_bins` must be at least num_quantized_bins = {num_quantized_bins}, got {num_bins}"
        )
    if num_bins >= 2**63:
        raise InvalidInputError(f"`num_bins` must be below 2**63, got {num_bins}")
    return _bounds(int(num_bins), int(num_quantized_bins))


def quantized_distribution(values: Array, support: Array, *, num_quantized_bins: int = 255) -> Array:
    """Merge `values` into groups of bins, and spread the total of each group evenly over its supported bins.

    A bin is supported if `support` is not zero there. The other bins become 0.

    Parameters
    ----------
    values : array, shape (n,), counts or weights >= 0
        The sliced histogram S of a candidate.
    support : array, shape (n,), counts or weights >= 0
        The reference distribution P of the candidate. Only its zeros matter.
    num_quantized_bins : int, odd, at least 3 and at most n

    Returns
    -------
    array, shape (n,), float64, in the library of `values`
        The total of every group with a supported bin is the same as in `values`.

    Raises
    ------
    InvalidInputError
        If an entry is NaN, infinite or negative, the shapes differ, or there are fewer bins than levels.
    ArrayTypeError
        If the arrays are not NumPy or JAX arrays of real numbers, or come from different libraries.

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
    merge_partition(values.shape[0], num_quantized_bins=num_quantized_bins)  # only for its checks
    return _quantized_distribution(values, support, num_quantized_bins=int(num_quantized_bins))


def _bounds(num_bins: int, num_quantized_bins: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
    return np.append(num_bins // num_quantized_bins * np.arange(num_quantized_bins), num_bins)


@functools.partial(compiled, elementwise=False)
def _quantized_distribution(values: Array, support: Array, *, xp: ModuleType, num_quantized_bins: int) -> Array:
    values, support = in_float64(values, xp=xp), in_float64(support, xp=xp)
    bounds = _bounds(values.shape[0], num_quantized_bins)
    total = counts_between(sum_up(values, 0, xp=xp), bounds[:-1], bounds[1:], xp=xp)
    filled = filled_between(sum_up(support > 0, 0, xp=xp), bounds[:-1], bounds[1:])
    group = np.repeat(np.arange(num_quantized_bins), np.diff(bounds))
    merged = xp.where(support > 0, (total / xp.maximum(filled, 1))[group], 0.0)
    return xp.where(is_sound(values, xp=xp) & is_sound(support, xp=xp), merged, xp.nan)
