"""Strategies for histograms. They draw arrays instead of seeds, so that examples shrink."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument
from hypothesis.extra import numpy as npst
from hypothesis.strategies import SearchStrategy
from numpy.typing import NDArray

Counts = NDArray[Any]
Vector = NDArray[np.float64]

SIZES = ((15, 3), (33, 3), (33, 15), (101, 15), (255, 15), (255, 255), (257, 255))


class HistogramCase(NamedTuple):
    """A histogram, its edges, and a number of levels that suits it. Unpack it into the arguments of a search."""

    hist: Counts
    """Counts (int64) or weights (float64), shape (num_bins,); num_bins is odd."""
    edges: Vector
    """Bin edges, shape (num_bins + 1,), float64, symmetric about 0."""
    num_quantized_bins: int
    """Number of levels, odd, at most num_bins."""


def dense(num_bins: int, *, most: int = 1000, least: int = 0) -> SearchStrategy[Counts]:
    """Draw any counts."""
    return npst.arrays(np.int64, num_bins, elements=st.integers(least, most))


def sparse(num_bins: int) -> SearchStrategy[Counts]:
    """Nearly all bins are empty."""
    return npst.arrays(np.int64, num_bins, elements=st.integers(0, 50), fill=st.just(0))


@st.composite
def spike(draw: st.DrawFn, num_bins: int) -> Counts:
    """One bin is far above the others."""
    hist: Counts = draw(dense(num_bins, most=3))
    hist[draw(st.integers(0, num_bins - 1))] = draw(st.integers(1000, 2**50))
    return hist


@st.composite
def comb(draw: st.DrawFn, num_bins: int) -> Counts:
    """Only every k-th bin is filled, as for data that are already quantized."""
    kept = np.arange(num_bins) % draw(st.integers(2, 7)) == draw(st.integers(0, 6))
    hist: Counts = draw(dense(num_bins, least=1)) * kept
    return hist


@st.composite
def one_sided(draw: st.DrawFn, num_bins: int) -> Counts:
    """No negative values, with or without zeros, as after a ReLU."""
    hist = draw(dense(num_bins))
    hist[: num_bins // 2] = 0
    hist[num_bins // 2] *= draw(st.sampled_from([0, 1, 1000]))
    return hist


@st.composite
def heavy_tail(draw: st.DrawFn, num_bins: int) -> Counts:
    """Let the counts fall with a power of the distance from 0, plus noise."""
    distance = np.abs(np.arange(num_bins) - num_bins // 2) + 1.0
    smooth = draw(st.integers(1, 10**6)) * distance ** -draw(st.floats(0.5, 4))
    noisy: Counts = smooth.astype(np.int64) + draw(dense(num_bins, most=2))
    return noisy


@st.composite
def few_samples(draw: st.DrawFn, num_bins: int) -> Counts:
    """At most 20 values."""
    return np.bincount(draw(st.lists(st.integers(0, num_bins - 1), min_size=1, max_size=20)), minlength=num_bins)


@st.composite
def inner(draw: st.DrawFn, num_bins: int) -> Counts:
    """All mass lies within the narrowest candidates, with or without the centre bin."""
    hist = draw(dense(num_bins))
    hist[: num_bins // 3] = hist[-(num_bins // 3) :] = 0
    hist[num_bins // 2] *= draw(st.booleans())
    return hist


def huge(num_bins: int) -> SearchStrategy[Counts]:
    """Draw counts beyond what float32 represents."""
    return dense(num_bins, most=2**50)


@st.composite
def weights(draw: st.DrawFn, num_bins: int) -> Counts:
    """Weights whose sums are exact. Some are below the eps of the smoothing, and many may be 0."""
    small, large = st.integers(1, 99).map(lambda k: k / 2**14), st.integers(1, 9999).map(lambda k: k / 2**4)
    fill = draw(st.sampled_from([None, st.just(0.0)]))
    return draw(npst.arrays(np.float64, num_bins, elements=st.just(0.0) | small | large, fill=fill))


def rounded_weights(num_bins: int) -> SearchStrategy[Counts]:
    """Weights whose sums need rounding."""
    return npst.arrays(np.float64, num_bins, elements=st.just(0.0) | st.floats(1e-3, 1e3))


_INTEGERS = (dense, sparse, spike, comb, one_sided, heavy_tail, few_samples, inner, huge)
_STRATEGIES: dict[str, Callable[..., SearchStrategy[Counts]]] = {
    shape.__name__: shape for shape in (*_INTEGERS, weights, rounded_weights)
}
COUNT_SHAPES = tuple(shape.__name__ for shape in _INTEGERS)
"""The shapes with integer counts."""
WEIGHT_SHAPES = ("weights", "rounded_weights")
"""The shapes with real weights. The sums of the first are exact in float64."""


def counts(num_bins: int, *, shape: str = "dense") -> SearchStrategy[Counts]:
    """Draw the counts of one histogram.

    Parameters
    ----------
    num_bins : int
    shape : str
        One of `COUNT_SHAPES` and `WEIGHT_SHAPES`.

    Returns
    -------
    strategy for arrays, shape (num_bins,), int64, or float64 for weights

    Raises
    ------
    InvalidArgument
        If there is no such shape.
    """
    _check_shape(shape)
    return _STRATEGIES[shape](num_bins)


def _check_shape(shape: str) -> None:
    if shape not in _STRATEGIES:
        raise InvalidArgument(f"a shape must be one of {', '.join(_STRATEGIES)}, got {shape!r}")


def edges(num_bins: int, *, equal_bins: bool = False) -> SearchStrategy[Vector]:
    """Draw edges symmetric about 0, of equal bins or of bins of any width.

    Parameters
    ----------
    num_bins : int, odd
    equal_bins : bool
        Draw equal bins only.

    Returns
    -------
    strategy for arrays, shape (num_bins + 1,), float64
        They are exactly antisymmetric.

    Raises
    ------
    InvalidArgument
        By Hypothesis, if an argument is out of range.
    """
    widths = npst.arrays(np.float64, num_bins // 2 + 1, elements=st.floats(0.125, 8))
    shape = st.just(None) if equal_bins else st.none() | widths
    return st.builds(_edges, st.just(num_bins), st.floats(1e-6, 1e6), shape)


def _edges(num_bins: int, amax: float, widths: Vector | None) -> Vector:
    if widths is None:
        even: Vector = (2 * np.arange(num_bins + 1) - num_bins) / num_bins * amax
        return even
    right = np.cumsum(widths) * amax
    return np.concatenate([-right[::-1], right])


def histograms(
    *,
    sizes: Sequence[tuple[int, int]] = SIZES,
    shapes: Sequence[str] = (*COUNT_SHAPES, "weights"),
    equal_bins: bool = False,
) -> SearchStrategy[HistogramCase]:
    """Draw a histogram as it troubles searches: dense, sparse, spiked, one-sided, heavy-tailed, huge ...

    Parameters
    ----------
    sizes : sequence of (num_bins, num_quantized_bins)
        Both odd. Draw from few sizes if your code is compiled for each.
    shapes : sequence of str
        From `COUNT_SHAPES` and `WEIGHT_SHAPES`.
    equal_bins : bool
        Draw equal bins only.

    Returns
    -------
    strategy for HistogramCase

    Raises
    ------
    InvalidArgument
        If there is no such shape.
    """
    for shape in shapes:
        _check_shape(shape)

    def of_size(chosen: tuple[tuple[int, int], str]) -> SearchStrategy[HistogramCase]:
        (num_bins, levels), shape = chosen
        parts = counts(num_bins, shape=shape), edges(num_bins, equal_bins=equal_bins), st.just(levels)
        return st.builds(HistogramCase, *parts)

    return st.tuples(st.sampled_from(sizes), st.sampled_from(shapes)).flatmap(of_size)


def same_counts(hist: Counts) -> SearchStrategy[Counts]:
    """Draw the same counts in another integer type, byte order or memory layout.

    Parameters
    ----------
    hist : array, shape (num_bins,), integer counts

    Returns
    -------
    strategy for arrays, shape (num_bins,)
        int8 to uint64, as far as the type holds the counts; some are not contiguous, not aligned or read-only.

    Raises
    ------
    InvalidArgument
        By Hypothesis, if no integer type holds the counts.
    """
    types = [t for t in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8") if hist.max() <= np.iinfo(t).max]
    stored = st.builds(lambda order, kind: hist.astype(order + kind), st.sampled_from("<>"), st.sampled_from(types))
    layouts: list[Callable[[Counts], Counts]] = [
        lambda counts: counts,
        lambda counts: np.repeat(counts, 2)[::2],
        lambda counts: np.frombuffer(b"." + counts.tobytes(), counts.dtype, offset=1),
    ]
    return st.builds(lambda layout, counts: layout(counts), st.sampled_from(layouts), stored)
