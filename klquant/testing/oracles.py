"""Oracles: what is right, in plain loops over Python's integers and fractions, and assertions that compare with it."""

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from klquant import reference

Levels = NDArray[np.int64]


def nearest_levels(x: ArrayLike, scale: float, *, num_quantized_bins: int = 255) -> Levels:
    """Return the level nearest to each value, with exact fractions: ``clamp(round_half_even(x / scale), -qmax, qmax)``.

    Parameters
    ----------
    x : array-like of finite or infinite numbers
    scale : float, positive
        Step between two levels.
    num_quantized_bins : int, odd, at least 3

    Returns
    -------
    np.ndarray, shape of `x`, int64

    Raises
    ------
    ValueError
        If `x` holds NaN.
    """
    values, qmax, step = np.asarray(x, np.float64), num_quantized_bins // 2, Fraction(scale)
    levels = [_nearest(value, step, qmax) for value in values.ravel().tolist()]
    return np.array(levels, np.int64).reshape(values.shape)


def _nearest(value: float, step: Fraction, qmax: int) -> int:
    if math.isinf(value):
        return qmax if value > 0 else -qmax
    return max(-qmax, min(qmax, round(Fraction(value) / step)))


def assert_nearest_levels(
    levels: Any, x: ArrayLike, scale: float, *, num_quantized_bins: int = 255, tolerance: float = 1e-4
) -> None:
    """Assert that every value is quantized to its nearest level.

    Parameters
    ----------
    levels : array-like, integers
        What your quantizer returns for `x`.
    x : array-like
        The data, of the shape of `levels`.
    scale : float, positive
        Step between two levels.
    num_quantized_bins : int, odd, at least 3
    tolerance : float, in steps
        Within this distance of half a step either level is right. Computing in float32 or with a reciprocal of the
        scale needs some; 0 asks for the even level exactly half-way.

    Raises
    ------
    AssertionError
        If a level is outside of the range or not the nearest.
    """
    found, values = np.asarray(levels), np.asarray(x, np.float64)
    assert found.shape == values.shape, f"expected levels of shape {values.shape}, got {found.shape}"
    whole = np.flatnonzero(found.ravel() != np.rint(found.ravel()))
    assert not whole.size, f"levels must be integers, got {found.flat[whole[0]]} (value {whole[0]})"
    expected, step = nearest_levels(values, scale, num_quantized_bins=num_quantized_bins), Fraction(scale)
    for k in np.flatnonzero(found.ravel() != expected.ravel()).tolist():
        level, right, value = int(found.flat[k]), int(expected.flat[k]), float(values.flat[k])
        halfway = math.isfinite(value) and abs(Fraction(value) / step - Fraction(level + right, 2)) <= tolerance
        allowed = abs(level - right) == 1 and abs(level) <= num_quantized_bins // 2 and halfway and tolerance > 0
        assert allowed, f"{value} / {scale} must become level {right}, got {level} (value {k})"


def assert_counts(hist: Any, edges: Any, x: ArrayLike) -> None:
    """Assert that a symmetric histogram with equal bins counts every value in its bin.

    A value on an edge belongs to the bin further from 0, and a value outside of the range to the outermost bin.

    Parameters
    ----------
    hist : array-like, shape (num_bins,), counts
    edges : array-like, shape (num_bins + 1,)
    x : array-like
        The data.

    Raises
    ------
    AssertionError
        If a count is wrong, or `edges` are not equal steps from -amax to amax.
    """
    found, bounds = np.asarray(hist), np.asarray(edges, np.float64)
    num_bins, amax = len(bounds) - 1, float(bounds[-1])
    even = [float(Fraction(2 * k - num_bins, num_bins) * Fraction(amax)) for k in range(num_bins + 1)]
    np.testing.assert_allclose(bounds, even, rtol=1e-12, atol=0, err_msg="edges")
    expected = reference.histogram(np.asarray(x, np.float64), amax, num_bins)
    np.testing.assert_array_equal(found, expected, err_msg="counts")


def assert_merge_partition(bounds: Any, num_bins: int, *, num_quantized_bins: int = 255) -> None:
    """Assert that bins are merged into groups of equal size, of which the last one also takes the remainder.

    Parameters
    ----------
    bounds : array-like, shape (num_quantized_bins + 1,), integers
        Group j has the bins ``bounds[j] <= k < bounds[j + 1]``.
    num_bins : int, at least `num_quantized_bins`
    num_quantized_bins : int

    Raises
    ------
    AssertionError
        If a bin is in no group or in two, or a group has the wrong size.
    """
    borders = [int(bound) for bound in np.asarray(bounds)]
    size = num_bins // num_quantized_bins
    members = [k for low, high in itertools.pairwise(borders) for k in range(low, high)]
    sizes = [high - low for low, high in itertools.pairwise(borders)]
    assert members == list(range(num_bins)), "every bin must be in exactly one group"
    right = [size] * (num_quantized_bins - 1) + [num_bins - size * (num_quantized_bins - 1)]
    assert sizes == right, f"groups must have the sizes {right}, got {sizes}"


def assert_merged(merged: Any, values: Any, support: Any, *, num_quantized_bins: int = 255) -> None:
    """Assert that a distribution Q is flat on the supported bins of each group, 0 elsewhere, and keeps each total.

    Parameters
    ----------
    merged : array-like, shape (n,)
        What your function returns for `values` and `support`.
    values : array-like, shape (n,)
        The counts before merging.
    support : array-like, shape (n,)
        Not 0 where a bin is supported.
    num_quantized_bins : int

    Raises
    ------
    AssertionError
        If a bin without support is not 0, a group is not flat, or its total is wrong.
    """
    found, before, kept = np.asarray(merged, np.float64), np.asarray(values), np.asarray(support) != 0
    size = len(found) // num_quantized_bins
    group = [min(k // size, num_quantized_bins - 1) for k in range(len(found))]
    assert not found[~kept].any(), "bins without support must be 0"
    for j in range(num_quantized_bins):
        members = np.array(group) == j
        filled = found[members & kept].tolist()
        assert len(set(filled)) <= 1, f"group {j} must be flat, got {filled}"
        total = math.fsum(before[members].tolist()) if filled else 0.0
        np.testing.assert_allclose(math.fsum(filled), total, rtol=1e-12, atol=1e-12, err_msg=f"total of group {j}")


def assert_optimal(
    index: Any,
    hist: Any,
    *,
    num_quantized_bins: int = 255,
    eps: float = 1e-4,
    one_sided: bool = False,
    regret: float = 1e-15,
) -> None:
    """Assert that a search by KL divergence found the best candidate, compared with :mod:`klquant.reference`.

    Parameters
    ----------
    index : int, or None
        The candidate that was found, 0 for the narrowest; -1 or None if none is feasible.
    hist : array-like, shape (num_bins,), counts or weights
    num_quantized_bins : int
    eps : float
        The value that replaces a zero when P and Q are smoothed.
    one_sided : bool
        Whether ``|x|`` was searched.
    regret : float, in nats
        How much more divergence than that of the best candidate is only rounding.

    Raises
    ------
    AssertionError
        If another candidate is better by more than `regret`, or one was found where none is feasible.
    """
    search = reference.one_sided_divergence_curve if one_sided else reference.divergence_curve
    curve = search(np.asarray(hist), num_quantized_bins, eps)
    chosen, best = -1 if index is None else int(index), int(np.argmin(curve))
    if math.isinf(curve[best]):
        assert chosen < 0, f"no candidate is feasible, got {chosen}"
        return
    assert 0 <= chosen < len(curve), f"candidate {best} of {len(curve)} is feasible, got {chosen}"
    worse = float(curve[chosen] - curve[best])
    assert worse <= regret, f"candidate {best} has {worse:.3g} nats less than {chosen}"
