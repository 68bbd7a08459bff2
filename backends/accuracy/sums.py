"""Sums over a tensor and its approximation, from which SQNR and cosine follow."""

import math
from typing import Any, NamedTuple

import numpy as np


class Sums(NamedTuple):
    """Sums over a tensor x and its approximation y; sums over parts of the data add up."""

    signal: float = 0.0
    """Sum of x^2."""
    noise: float = 0.0
    """Sum of (x - y)^2."""
    product: float = 0.0
    """Sum of x y."""
    energy: float = 0.0
    """Sum of y^2."""

    def plus(self, other: "Sums") -> "Sums":
        """Return the sums over the data of both."""
        return Sums(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise ratio; +inf without noise, NaN without data."""
        if self.noise == 0:
            return math.inf if self.signal else math.nan
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    @property
    def cosine(self) -> float:
        """Cosine of the angle between x and y; NaN if either is 0."""
        length = math.sqrt(self.signal) * math.sqrt(self.energy)
        return self.product / length if length else math.nan


def compare_arrays(reference: "np.ndarray[Any, Any]", approximation: "np.ndarray[Any, Any]") -> Sums:
    """Sum in float64 over two arrays of one shape, only where the reference is finite: masks may hold infinity."""
    x, y = (array.astype(np.float64).ravel() for array in (reference, approximation))
    finite = np.isfinite(x)
    if not finite.all():
        x, y = x[finite], y[finite]
    noise = x - y
    return Sums(float(x @ x), float(noise @ noise), float(x @ y), float(y @ y))
