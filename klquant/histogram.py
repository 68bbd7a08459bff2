"""Symmetric histograms with an odd number of bins: count data, and merge histograms (a monoid).

A value is multiplied once, and the rest is integer arithmetic. So every library, chunk size and machine puts a value
into the same bin: there is no floating-point sum that a compiler could fuse and round differently.
"""

from types import ModuleType
from typing import NamedTuple

import numpy as np

from klquant._namespace import Array, array_namespace, compiled, count_truncated, from_numpy, is_concrete
from klquant._validate import check_odd, check_positive, check_real
from klquant.errors import ArrayTypeError, InvalidInputError


class Histogram(NamedTuple):
    """Counts in equal bins that are symmetric about 0."""

    hist: Array
    """Counts, shape (num_bins,), int64."""
    edges: Array
    """Bin edges, shape (num_bins + 1,), float64, in units of the data."""


def histogram(x: Array, *, num_bins: int = 4001, amax: float | None = None) -> Histogram:
    """Count `x` into `num_bins` equal bins over [-amax, amax].

    Parameters
    ----------
    x : array, any shape, real
        May be empty if `amax` is given. The result is then the neutral element of :func:`merge`.
    num_bins : int, odd, at least 3
        An odd number puts 0 in the middle of the centre bin.
    amax : float, optional
        Range of the bins, > 0, in units of `x`. The default is ``max |x|``. Pass it to count data in chunks. Values
        beyond it are counted in the outermost bins, as a quantizer would saturate them.

    Returns
    -------
    Histogram
        `hist` (int64) and `edges` (float64), both in the library of `x`. To compute with them in JAX, enable 64-bit
        types, as in ``with jax.enable_x64(True)``.

    Raises
    ------
    InvalidInputError
        If `x` contains NaN or infinity, `num_bins` is even, or `amax` is not positive and finite; also if `amax` is
        missing and `x` is empty or all zero.
    ArrayTypeError
        If `x` is a list or a torch tensor, or its dtype is not real; also if `x` is traced and `amax` is missing.

    Notes
    -----
    A value on an edge is counted in the bin further from 0, so ``-x`` has the mirrored histogram. The values amax and
    -amax are counted in the last and the first bin. Edges are multiples of ``amax / num_bins``, rounded once. Scaling
    `x` and `amax` by a power of two scales the edges exactly and leaves the counts as they are.

    Examples
    --------
    >>> import numpy as np, klquant
    >>> klquant.histogram(np.array([-3.0, 0.0, 0.5, 2.0]), num_bins=3)
    Histogram(hist=array([1, 2, 1]), edges=array([-3., -1.,  1.,  3.]))
    """
    xp = array_namespace(x=x)
    check_odd("num_bins", num_bins)
    check_real("x", x)
    largest = _largest(x) if is_concrete(x) else None
    if amax is None:
        amax = _range_of(x, largest)
    check_positive("amax", amax)
    num_bins = int(num_bins)
    half_bins = num_bins / float(amax)  # per unit of x; amax is num_bins of them
    if not np.isfinite(half_bins):
        raise InvalidInputError(f"`amax` must be large enough to be divided into {num_bins} bins, got {amax}")
    clip = largest is None or largest * half_bins >= num_bins + 1
    hist = _count(x.reshape(-1), from_numpy(np.asarray(half_bins), xp=xp), num_bins=num_bins, clip=clip)
    return Histogram(hist, from_numpy(symmetric_edges(float(amax), num_bins), xp=xp))


def merge(a: Histogram, b: Histogram) -> Histogram:
    """Add two histograms with the same edges, as if their data had been counted together.

    Parameters
    ----------
    a, b : Histogram
        Results of :func:`histogram` with the same `num_bins` and `amax`, in the same library.

    Returns
    -------
    Histogram
        New arrays. The sum is exact, associative and commutative, so the result does not depend on how the data were
        split.

    Raises
    ------
    InvalidInputError
        If the edges differ, or a sum of counts would overflow int64.
    ArrayTypeError
        If the two come from different libraries.

    Examples
    --------
    >>> import numpy as np, klquant
    >>> x = np.linspace(-1, 1, 11)
    >>> parts = [klquant.histogram(part, num_bins=3, amax=1.0) for part in (x[:4], x[4:])]
    >>> klquant.merge(*parts).hist.tolist() == klquant.histogram(x, num_bins=3).hist.tolist()
    True
    """
    array_namespace(a=a.hist, b=b.hist)
    if a.hist.shape != b.hist.shape:
        raise InvalidInputError(
            f"histograms must have the same number of bins, got {a.hist.shape[0]} and {b.hist.shape[0]}"
        )
    if is_concrete(a.edges, b.edges) and not np.array_equal(np.asarray(a.edges), np.asarray(b.edges)):
        raise InvalidInputError(
            f"histograms must have the same edges, got ranges up to {a.edges[-1]} and {b.edges[-1]}; "
            "count all data with the same `amax`"
        )
    hist = _add(a.hist, b.hist)
    if is_concrete(hist) and (np.asarray(hist) < np.asarray(a.hist)).any():
        raise InvalidInputError("the sum of the counts must stay below 2**63")
    return Histogram(hist, a.edges)


def symmetric_edges(amax: float, num_bins: int) -> np.ndarray:
    """Return `num_bins` + 1 equally spaced edges from -amax to amax, exactly antisymmetric, float64."""
    odd = 2 * np.arange(num_bins + 1) - num_bins
    return odd / num_bins * amax


def _largest(x: Array) -> float:
    """Return max |x|, or 0 if `x` is empty."""
    largest = max(abs(float(bound)) for bound in _extremes(x)) if x.size else 0.0
    if not np.isfinite(largest):
        raise InvalidInputError(f"`x` must be finite, got {int(_count_bad(x))} NaN or infinite values out of {x.size}")
    return largest


def _range_of(x: Array, largest: float | None) -> float:
    if largest is None:
        raise ArrayTypeError("`amax` must be given when `x` is traced: the edges depend on it")
    if largest == 0:
        raise InvalidInputError(f"`x` must have a value other than 0, got {x.size} zeros; or pass `amax`")
    return largest


@compiled
def _extremes(x: Array, *, xp: ModuleType) -> tuple[Array, Array]:
    return xp.min(x), xp.max(x)


@compiled
def _count_bad(x: Array, *, xp: ModuleType) -> Array:
    return (~xp.isfinite(x)).sum()


@compiled
def _count(x: Array, half_bins: Array, *, xp: ModuleType, num_bins: int, clip: bool) -> Array:
    halves = count_truncated(x, half_bins, num_bins, clip=clip, xp=xp)
    right, left = (_pair(half, xp=xp) for half in (halves[num_bins + 1 :], halves[num_bins - 1 :: -1]))
    return xp.concatenate([left[::-1], halves[num_bins : num_bins + 1], right])


def _pair(halves: Array, *, xp: ModuleType) -> Array:
    """Add up pairs of half bins, ordered by distance. The outermost one has |x| = amax only, and joins the last bin."""
    joined = xp.concatenate([halves[:-2], halves[-2:-1] + halves[-1:]])
    return joined.reshape(-1, 2).sum(axis=1)


@compiled
def _add(a: Array, b: Array, *, xp: ModuleType) -> Array:
    return a + b
