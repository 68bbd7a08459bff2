"""Strategies for data and scales."""

from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from hypothesis.strategies import SearchStrategy
from numpy.typing import NDArray

Data = NDArray[Any]


def activations(*, dtype: Any = "float32", max_size: int = 60, limit: float = 1e6) -> SearchStrategy[Data]:
    """Draw real data of any sign, small and large, with zeros of both signs; also empty arrays.

    Parameters
    ----------
    dtype : dtype, or its name
        ``"float16"``, ``"float32"`` or ``"float64"``.
    max_size : int
        The largest number of values.
    limit : float
        The largest absolute value.

    Returns
    -------
    strategy for arrays, shape (n,), `dtype`

    Raises
    ------
    InvalidArgument
        By Hypothesis, if an argument is out of range.
    """
    kind = np.dtype(dtype)
    width: Any = 8 * kind.itemsize
    bound = float(kind.type(min(limit, float(np.finfo(kind).max))))
    elements = st.floats(-2, 2, width=width) | st.floats(-bound, bound, width=width) | st.sampled_from([0.0, -0.0])
    return npst.arrays(kind, st.integers(0, max_size), elements=elements)


def scales(*, dtype: Any = "float32") -> SearchStrategy[float]:
    """Draw a scale that this dtype represents, from 2**-13 to 2**13.

    Parameters
    ----------
    dtype : dtype, or its name
        ``"float16"``, ``"float32"`` or ``"float64"``.

    Returns
    -------
    strategy for floats

    Raises
    ------
    InvalidArgument
        By Hypothesis, if `dtype` is not one of these.
    """
    width: Any = 8 * np.dtype(dtype).itemsize
    return st.sampled_from([0.5, 1.0]) | st.floats(2.0**-13, 2.0**13, width=width)


def halfway_values(scale: float, *, dtype: Any = "float32", most: int = 300) -> SearchStrategy[Data]:
    """Draw values half-way between two levels, or their neighbours in floating point: quantizers get these wrong.

    Parameters
    ----------
    scale : float
        Step between two levels.
    dtype : dtype, or its name
        ``"float16"``, ``"float32"`` or ``"float64"``.
    most : int
        The largest absolute value, in half steps.

    Returns
    -------
    strategy for arrays, shape (n,), `dtype`

    Raises
    ------
    InvalidArgument
        By Hypothesis, if an argument is out of range.
    """
    kind = np.dtype(dtype)

    def values(pairs: list[tuple[int, int]]) -> Data:
        below, sides = np.array(pairs).T
        x: Data = (2 * below + 1).astype(kind) * kind.type(scale / 2)
        return np.where(sides == 0, x, np.nextafter(x, np.copysign(np.inf, sides).astype(kind)))

    pairs = st.tuples(st.integers(-((most + 1) // 2), (most - 1) // 2), st.sampled_from([0, -1, 1]))
    return st.lists(pairs, min_size=1, max_size=20).map(values)
