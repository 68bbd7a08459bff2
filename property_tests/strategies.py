"""Strategies of the property tests. They draw arrays instead of seeds, so that examples shrink."""

from typing import NamedTuple

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

SIZES = [(15, 3), (33, 3), (33, 15), (101, 15), (255, 15), (255, 255), (257, 255)]  # bins, levels
JAX_SIZES = SIZES if settings().max_examples > 1000 else [(33, 15)]  # each one costs a compilation per function


class Counted(NamedTuple):
    hist: np.ndarray
    edges: np.ndarray
    num_quantized_bins: int


def fewer():
    """Run a fifth of the examples, for slow tests."""
    return settings(max_examples=max(5, settings().max_examples // 5))


def counts(num_bins, most=1000, least=0):
    return npst.arrays(np.int64, num_bins, elements=st.integers(least, most))


@st.composite
def sparse(draw, num_bins):
    """Nearly all bins empty."""
    return draw(npst.arrays(np.int64, num_bins, elements=st.integers(0, 50), fill=st.just(0)))


@st.composite
def spike(draw, num_bins):
    """One bin far above the others."""
    hist = draw(counts(num_bins, most=3))
    hist[draw(st.integers(0, num_bins - 1))] = draw(st.integers(1000, 2**50))
    return hist


@st.composite
def comb(draw, num_bins):
    """Only every k-th bin filled, as for data that are already quantized."""
    kept = np.arange(num_bins) % draw(st.integers(2, 7)) == draw(st.integers(0, 6))
    return draw(counts(num_bins, least=1)) * kept


@st.composite
def one_sided(draw, num_bins):
    """No negative values, with or without zeros, as after a ReLU."""
    hist = draw(counts(num_bins))
    hist[: num_bins // 2] = 0
    hist[num_bins // 2] *= draw(st.sampled_from([0, 1, 1000]))
    return hist


@st.composite
def heavy_tail(draw, num_bins):
    """Counts that fall with a power of the distance from 0, plus noise."""
    distance = np.abs(np.arange(num_bins) - num_bins // 2) + 1.0
    smooth = draw(st.integers(1, 10**6)) * distance ** -draw(st.floats(0.5, 4))
    return smooth.astype(np.int64) + draw(counts(num_bins, most=2))


@st.composite
def few_samples(draw, num_bins):
    return np.bincount(draw(st.lists(st.integers(0, num_bins - 1), min_size=1, max_size=20)), minlength=num_bins)


@st.composite
def no_zeros_or_outliers(draw, num_bins):
    """All mass within the narrowest candidates, with or without the centre bin."""
    hist = draw(counts(num_bins))
    hist[: num_bins // 3] = hist[-(num_bins // 3) :] = 0
    hist[num_bins // 2] *= draw(st.booleans())
    return hist


def huge(num_bins):
    return counts(num_bins, most=2**50)


@st.composite
def weights(draw, num_bins):
    """Weights whose sums are exact. Some are below the eps of the smoothing, and many may be 0."""
    small, large = st.integers(1, 99).map(lambda k: k / 2**14), st.integers(1, 9999).map(lambda k: k / 2**4)
    fill = draw(st.sampled_from([None, st.just(0.0)]))
    return draw(npst.arrays(np.float64, num_bins, elements=st.just(0.0) | small | large, fill=fill))


def real_weights(num_bins):
    """Weights whose sums need rounding."""
    return npst.arrays(np.float64, num_bins, elements=st.just(0.0) | st.floats(1e-3, 1e3))


INTEGER_SHAPES = [counts, sparse, spike, comb, one_sided, heavy_tail, few_samples, no_zeros_or_outliers, huge]
SHAPES = [*INTEGER_SHAPES, weights]  # `real_weights` only where a test allows for their rounding
EPS = st.sampled_from([1e-6, 1e-4, 1e-3, 0.01, 0.03, 0.1]) | st.floats(1e-9, 0.5)


def even_edges(num_bins, amax):
    """Return equally spaced edges, exactly antisymmetric."""
    return (2 * np.arange(num_bins + 1) - num_bins) / num_bins * amax


@st.composite
def edges(draw, num_bins):
    """Edges symmetric about 0, of equal bins or of bins of any width."""
    amax = draw(st.floats(1e-6, 1e6))
    if draw(st.booleans()):
        return even_edges(num_bins, amax)
    right = np.cumsum(draw(npst.arrays(np.float64, num_bins // 2 + 1, elements=st.floats(0.125, 8)))) * amax
    return np.concatenate([-right[::-1], right])


@st.composite
def histograms(draw, sizes=tuple(SIZES), shapes=tuple(SHAPES)):
    """Draw a histogram, its edges, and a number of levels that suits it."""
    num_bins, levels = draw(st.sampled_from(sizes), label="bins, levels")
    shape = draw(st.sampled_from(shapes), label="shape")
    return Counted(draw(shape(num_bins), label="hist"), draw(edges(num_bins), label="edges"), levels)


@st.composite
def stored_otherwise(draw, hist):
    """Draw the same counts in another integer type, byte order or memory layout."""
    types = [t for t in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8") if hist.max() <= np.iinfo(t).max]
    stored = hist.astype(draw(st.sampled_from("<>")) + draw(st.sampled_from(types)))
    if draw(st.booleans()):
        return np.repeat(stored, 2)[::2]
    return np.frombuffer(b"." + stored.tobytes(), stored.dtype, offset=1) if draw(st.booleans()) else stored


def vectors(min_size=1, max_size=40):
    """Counts or weights, some of them 0."""
    whole = st.one_of(st.just(0), st.integers(0, 20), st.integers(0, 2**50))
    real = st.just(0.0) | st.floats(1e-3, 1e6)
    sizes = st.integers(min_size, max_size)
    return sizes.flatmap(lambda n: npst.arrays(np.int64, n, elements=whole) | npst.arrays(np.float64, n, elements=real))


def data(dtype=np.float64, max_size=60, limit=1e6):
    """Real data of any sign, small and large."""
    width = 8 * np.dtype(dtype).itemsize
    limit = min(limit, float(np.finfo(dtype).max))
    usual = st.floats(-limit, limit, width=width)
    small = st.floats(-2, 2, width=width)
    return npst.arrays(dtype, st.integers(0, max_size), elements=st.one_of(small, usual, st.sampled_from([0.0, -0.0])))
