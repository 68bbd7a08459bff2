"""Symmetric histograms with an odd number of bins: count data, and merge histograms (a monoid).

A value is multiplied once, and the rest is integer arithmetic. So every library, chunk size and machine puts a value
into the same bin: there is no floating-point sum that a compiler could fuse and round differently.
"""

import functools
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from klquant._namespace import (
    Array,
    array_namespace,
    compiled,
    count_truncated,
    each_row,
    from_numpy,
    is_array,
    is_concrete,
)
from klquant._validate import check_axis, check_counted, check_number, check_odd, check_real
from klquant.errors import ArrayTypeError, InvalidInputError

MAX_ROWS = 30  # of a batch, in a notebook


class Histogram(NamedTuple):
    """Counts in equal bins that are symmetric about 0."""

    hist: Array
    """Counts, shape (num_bins,), int64."""
    edges: Array
    """Bin edges, shape (num_bins + 1,), float64, in units of the data."""

    def _repr_html_(self) -> str | None:
        """Return a table for notebooks; None while JAX traces."""
        return _html_table(self.hist, self.edges) if is_concrete(self.hist, self.edges) else None


def histogram(
    x: Array, *, num_bins: int = 4001, amax: Array | float | None = None, axis: int | None = None
) -> Histogram:
    """Count `x` into `num_bins` equal bins over [-amax, amax].

    Parameters
    ----------
    x : array, any shape, real
        May be empty if `amax` is given. The result is then the neutral element of :func:`merge`.
    num_bins : int, odd, at least 3
        An odd number puts 0 in the middle of the centre bin.
    amax : float, or array of shape (x.shape[axis],) with `axis`, optional
        Range of the bins, > 0, in units of `x`. The default is ``max |x|``. Pass it to count data in chunks. Values
        beyond it are counted in the outermost bins, as a quantizer would saturate them. May be traced by JAX.
    axis : int, optional
        Channel axis of `x`: count each of its slices into a histogram, with a range for each. For example, 200 layers
        with as many values each, as rows of `x`, give 200 histograms with ``axis=0``. By default `x` is counted into
        one histogram.

    Returns
    -------
    Histogram
        `hist` (int64) and `edges` (float64), both in the library of `x`; with `axis` they have a row for each slice. To
        compute with them in JAX, enable 64-bit types, as in ``with jax.enable_x64(True)``. Under ``jax.jit``, where
        `x` is not finite or `amax` not positive, the edges are NaN, and so are the thresholds.

    Raises
    ------
    InvalidInputError
        If `x` contains NaN or infinity, `num_bins` is even, or `amax` is not positive and finite; also if `amax` is
        missing and `x` (or a slice) is empty or all zero.
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
    axis = None if axis is None else check_axis("x", x, axis)
    largest = _largest(x, axis) if is_concrete(x) else None
    ranges = _check_ranges(_range_of(x, largest) if amax is None else amax, x, axis, int(num_bins))
    if is_concrete(ranges):
        with np.errstate(all="ignore"):
            clip = largest is None or bool((largest * (num_bins / ranges) >= num_bins + 1).any())
        ranges = from_numpy(ranges, xp=xp)
    else:
        array_namespace(x=x, amax=ranges)
        clip = True
    sound = largest is not None and is_concrete(ranges)
    return _histogram(x, ranges, num_bins=int(num_bins), axis=axis, clip=clip, sound=sound)


def merge(a: Histogram, b: Histogram) -> Histogram:
    """Add two histograms with the same edges, as if their data had been counted together.

    Parameters
    ----------
    a, b : Histogram
        Results of :func:`histogram` with the same `num_bins` and `amax`, in the same library.

    Returns
    -------
    Histogram
        New arrays, with int64 counts. The sum is exact, associative and commutative, so the result does not depend on
        how the data were split. Under ``jax.jit``, the edges are NaN for histograms that cannot be merged.

    Raises
    ------
    InvalidInputError
        If a count is NaN, infinite or negative, the number of edges is not that of the bins plus one, the edges differ,
        or a sum of counts would overflow int64.
    ArrayTypeError
        If the two are not histograms of real numbers, or come from different libraries.

    Examples
    --------
    >>> import numpy as np, klquant
    >>> x = np.linspace(-1, 1, 11)
    >>> parts = [klquant.histogram(part, num_bins=3, amax=1.0) for part in (x[:4], x[4:])]
    >>> klquant.merge(*parts).hist.tolist() == klquant.histogram(x, num_bins=3).hist.tolist()
    True
    """
    for name, histogram in (("a", a), ("b", b)):
        if not isinstance(histogram, Histogram):
            raise ArrayTypeError(f"`{name}` must be a Histogram, got {type(histogram).__name__}")
        array_namespace(**{f"{name}.hist": histogram.hist, f"{name}.edges": histogram.edges})
        check_counted(name, *histogram)
    array_namespace(a=a.hist, b=b.hist)
    if a.hist.shape != b.hist.shape:
        numbers = [h.hist.shape[-1] if h.hist.ndim == 1 else tuple(h.hist.shape) for h in (a, b)]
        raise InvalidInputError(f"histograms must have the same number of bins, got {numbers[0]} and {numbers[1]}")
    if is_concrete(a.edges, b.edges) and not np.array_equal(np.asarray(a.edges), np.asarray(b.edges)):
        raise InvalidInputError(
            f"histograms must have the same edges, got ranges up to {a.edges[-1]} and {b.edges[-1]}; "
            "count all data with the same `amax`"
        )
    hist = _add(a.hist, b.hist)
    if is_concrete(hist) and (np.asarray(hist) < np.maximum(np.asarray(a.hist), np.asarray(b.hist))).any():
        raise InvalidInputError("the sum of the counts must stay below 2**63")
    return Histogram(hist, a.edges if is_concrete(*a, *b) else _common_edges(*a, *b))


def symmetric_edges(amax: float, num_bins: int) -> np.ndarray:
    """Return `num_bins` + 1 equally spaced edges from -amax to amax, exactly antisymmetric, float64."""
    odd = 2 * np.arange(num_bins + 1) - num_bins
    return odd / num_bins * amax


def _largest(x: Array, axis: int | None) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Return max |x| of each slice, or 0 if it is empty."""
    if not x.size:
        return np.zeros(1 if axis is None else x.shape[axis])
    low, high = (np.asarray(bound, np.float64) for bound in _extremes(x, axis=axis))
    largest = np.maximum(np.abs(low), np.abs(high))
    if not np.isfinite(largest).all():
        raise InvalidInputError(f"`x` must be finite, got {int(_count_bad(x))} NaN or infinite values out of {x.size}")
    return largest


def _range_of(x: Array, largest: Any) -> Any:
    if largest is None:
        raise ArrayTypeError("`amax` must be given when `x` is traced: the edges depend on it")
    if (largest == 0).any():
        where = f" at {np.flatnonzero(largest == 0)[:10].tolist()} of the axis" if largest.size > 1 else ""
        size = x.size // max(1, largest.size)
        raise InvalidInputError(f"`x` must have a value other than 0, got {size} zeros{where}; or pass `amax`")
    return largest if largest.size > 1 else largest[0]


def _check_ranges(amax: Any, x: Array, axis: int | None, num_bins: int) -> Any:
    """Return the range of each histogram, float64, or traced ranges as they are."""
    if not is_array(amax) or amax.ndim == 0:
        amax = check_number("amax", amax)
    number, expected = (1, "a number") if axis is None else (x.shape[axis], f"a number, or of shape ({x.shape[axis]},)")
    if np.shape(amax) != () and (axis is None or np.shape(amax) != (number,)):
        raise InvalidInputError(f"`amax` must be {expected}, got shape {tuple(np.shape(amax))}")
    if not is_concrete(amax):
        return amax
    ranges = np.broadcast_to(np.asarray(amax, np.float64), number)
    for bad in ranges[~(np.isfinite(ranges) & (ranges > 0))]:
        raise InvalidInputError(f"`amax` must be positive and finite, got {bad}")
    with np.errstate(over="ignore"):
        small = ranges[np.isinf(num_bins / ranges)]
    if small.size:
        raise InvalidInputError(f"`amax` must be large enough to be divided into {num_bins} bins, got {small[0]}")
    return ranges


def _as_rows(x: Array, axis: int | None, *, xp: ModuleType) -> Array:
    return x.reshape(1, -1) if axis is None else xp.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)


@functools.partial(compiled, elementwise=False)
def _extremes(x: Array, *, xp: ModuleType, axis: int | None) -> tuple[Array, Array]:
    rows = _as_rows(x, axis, xp=xp)
    return rows.min(axis=1), rows.max(axis=1)


@compiled
def _count_bad(x: Array, *, xp: ModuleType) -> Array:
    return (~xp.isfinite(x)).sum()


@functools.partial(compiled, elementwise=False)
def _histogram(
    x: Array, ranges: Array, *, xp: ModuleType, num_bins: int, axis: int | None, clip: bool, sound: bool
) -> Histogram:
    rows = _as_rows(x, axis, xp=xp)
    ranges = xp.broadcast_to(ranges.astype(xp.float64), rows.shape[0])
    half_bins = num_bins / ranges  # per unit of x; amax is num_bins of them

    def count(row: Array, half_bins: Array) -> Array:
        halves = count_truncated(row, half_bins, num_bins, clip=clip, xp=xp)
        right, left = (_pair(half, xp=xp) for half in (halves[num_bins + 1 :], halves[num_bins - 1 :: -1]))
        return xp.concatenate([left[::-1], halves[num_bins : num_bins + 1], right])

    hist, edges = each_row(count, rows, half_bins, xp=xp), symmetric_edges(1.0, num_bins) * ranges[:, None]
    if not sound:
        good = xp.isfinite(rows).all(axis=1) & xp.isfinite(ranges) & (ranges > 0) & xp.isfinite(half_bins)
        edges = xp.where(good[:, None], edges, xp.nan)
    return Histogram(hist, edges) if axis is not None else Histogram(hist[0], edges[0])


def _pair(halves: Array, *, xp: ModuleType) -> Array:
    """Add up pairs of half bins, ordered by distance. The outermost one has |x| = amax only, and joins the last bin."""
    joined = xp.concatenate([halves[:-2], halves[-2:-1] + halves[-1:]])
    return joined.reshape(-1, 2).sum(axis=1)


@compiled
def _add(a: Array, b: Array, *, xp: ModuleType) -> Array:
    return _wide(a, xp=xp) + _wide(b, xp=xp)


def _wide(h: Array, *, xp: ModuleType) -> Array:
    return h.astype(xp.int64 if h.dtype.kind in "iu" else xp.float64)  # sums of narrow counts would wrap


@compiled
def _common_edges(a: Array, edges: Array, b: Array, other_edges: Array, *, xp: ModuleType) -> Array:
    """Return the edges, NaN for histograms that :func:`merge` would have refused if they were not traced."""
    a, b = _wide(a, xp=xp), _wide(b, xp=xp)
    sound = ((a >= 0) & (b >= 0) & (a + b >= xp.maximum(a, b)) & xp.isfinite(a + b)).all(axis=-1)
    sound = sound if edges.ndim > 1 else sound.all()
    return xp.where((sound & (edges == other_edges).all(axis=-1))[..., None], edges, xp.nan)


def _html_table(hist: Array, edges: Array) -> str:
    """Return a table of a histogram, or of a batch of them: number of bins, range, values, zeros."""
    counts, ends = np.asarray(hist), np.asarray(edges, dtype=np.float64)
    bins, many = counts.shape[-1], counts.reshape(-1, counts.shape[-1])
    rows = [
        (f"{bins:,}", f"{end:.6g}", f"{row.sum():,}", f"{row[bins // 2]:,}")
        for row, end in zip(many[:MAX_ROWS], np.broadcast_to(ends[..., -1].reshape(-1), len(many)), strict=False)
    ]
    if len(many) > MAX_ROWS:
        rows.append((f"... {len(many) - MAX_ROWS} more", "", "", ""))
    head = "".join(f"<th>{title}</th>" for title in ("bins", "amax", "values", "in the centre bin"))
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
