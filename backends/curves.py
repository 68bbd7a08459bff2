"""Functions of one number, and the error that a quantization grid causes behind them.

If pointwise functions are all that reads a tensor, the error behind them is what counts. Before SiLU, for example, all
values below -8 are nearly alike.
"""

from typing import Any, NamedTuple

import numpy as np

import klquant

Array = np.ndarray[Any, Any]
PER_BIN = 2  # values that represent a bin
LEVELS = np.arange(256)
TINY = 1e-30


class Curve(NamedTuple):
    """The functions that read a tensor, each linear between some points."""

    points: Array
    """Shape (points,), ascending, in units of the activation."""
    values: Array
    """Shape (functions, points)."""

    def at(self, x: Array) -> Array:
        """Return the values of all functions at x, shape (functions, len(x))."""
        return np.stack([np.interp(x, self.points, row) for row in self.values])


class Behind(NamedTuple):
    """The values of a tensor, and of the functions that read it."""

    x: Array
    weights: Array
    """How often each value occurs, as a share."""
    curve: Curve
    values: Array
    """Of the functions at x."""
    units: Array
    """The power of x over that of each function, which makes errors comparable; 0 for a function that is 0."""

    @classmethod
    def of(cls, histogram: klquant.Histogram, curve: Curve) -> "Behind":
        """Return the values of a histogram, spread evenly over their bins."""
        edges, used = np.asarray(histogram.edges, np.float64), np.flatnonzero(histogram.hist)
        places = (np.arange(PER_BIN) + 0.5) / PER_BIN
        x = (edges[used, None] + np.diff(edges)[used, None] * places).ravel()
        weights = np.repeat(np.asarray(histogram.hist, np.float64)[used], PER_BIN)
        weights /= max(float(weights.sum()), TINY)
        values = curve.at(x)
        powers = np.square(values) @ weights
        units = np.divide(np.square(x) @ weights, powers, out=np.zeros(len(powers)), where=powers > TINY)
        return cls(x, weights, curve, values, units)

    def error(self, scale: float, zero_point: int) -> float:
        """Return the mean squared error behind the functions in squared units of x, summed.

        It compares with :func:`klquant.backends.ranges.expected_error`, which is that of the identity.
        """
        rounded = self.curve.at((LEVELS - zero_point) * scale)
        codes = np.clip(np.rint(self.x / scale) + zero_point, 0, 255).astype(np.int64)
        noise = np.square(rounded[:, codes] - self.values) @ self.weights
        return float(noise @ self.units)
