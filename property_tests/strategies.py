"""What only these tests need beside klquant.testing."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

SIZES = [(15, 3), (33, 3), (33, 15), (101, 15), (255, 15), (255, 255), (257, 255)]  # bins, levels
JAX_SIZES = SIZES if settings().max_examples > 1000 else [(33, 15)]  # each one costs a compilation per function
EPS = st.sampled_from([1e-6, 1e-4, 1e-3, 0.01, 0.03, 0.1]) | st.floats(1e-9, 0.5)


def fewer():
    """Run a fifth of the examples, for slow tests."""
    return settings(max_examples=max(5, settings().max_examples // 5))


def dense(num_bins, most=1000, least=0):
    return npst.arrays(np.int64, num_bins, elements=st.integers(least, most))


def even_edges(num_bins, amax):
    """Return equally spaced edges, exactly antisymmetric."""
    return (2 * np.arange(num_bins + 1) - num_bins) / num_bins * amax


def vectors(min_size=1, max_size=40):
    """Counts or weights, some of them 0."""
    whole = st.one_of(st.just(0), st.integers(0, 20), st.integers(0, 2**50))
    real = st.just(0.0) | st.floats(1e-3, 1e6)
    sizes = st.integers(min_size, max_size)
    return sizes.flatmap(lambda n: npst.arrays(np.int64, n, elements=whole) | npst.arrays(np.float64, n, elements=real))
