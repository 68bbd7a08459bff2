"""The algorithm literally, in loops, NumPy float64: the oracle that the fast path is checked against.

Shares no code with the fast path. It takes seconds where that takes milliseconds; its worth is that each line
can be compared with the description by eye.
"""

import math

import numpy as np
from numpy.typing import NDArray

from klquant.errors import InfeasibleError

Vector = NDArray[np.float64]


def smooth(values: Vector, eps: float = 1e-4) -> Vector | None:
    """Turn zeros into `eps` at the cost of the others; None where that is infeasible."""
    zeros = int(np.sum(values == 0))
    nonzeros = len(values) - zeros
    if nonzeros == 0:
        return None
    eps1 = eps * zeros / nonzeros
    if eps1 >= 1:
        return None
    smoothed = values.astype(np.float64)
    for k in range(len(values)):
        smoothed[k] = eps if values[k] == 0 else smoothed[k] - eps1
    return smoothed if smoothed.min() > 0 else None


def kl_divergence(p: Vector, q: Vector) -> float:
    """Sum p log(p / q) over the normalised distributions, in nats."""
    p, q = p / p.sum(), q / q.sum()
    return math.fsum(pk * math.log(pk / qk) for pk, qk in zip(p.tolist(), q.tolist(), strict=True) if pk > 0)


def reference_distribution(hist: NDArray[np.int64], start: int, stop: int) -> Vector:
    """Return P: the window of the histogram with the outliers added to its end bins."""
    p = hist[start:stop].astype(np.float64)
    p[0] = hist[: start + 1].sum()
    p[-1] = hist[stop - 1] + hist[stop:].sum()
    return p


def quantized_distribution(values: Vector, support: Vector, num_quantized_bins: int = 255) -> Vector:
    """Merge `values` into groups and spread each total over the bins of its group where `support` is not zero."""
    width = len(values)
    size = width // num_quantized_bins
    q = np.zeros(width)
    for j in range(num_quantized_bins):
        low = j * size
        high = (j + 1) * size if j < num_quantized_bins - 1 else width
        total = values[low:high].sum()
        count = np.sum(support[low:high] != 0)
        for k in range(low, high):
            if support[k] != 0:
                q[k] = total / count
    return q


def divergence_curve(hist: NDArray[np.int64], num_quantized_bins: int = 255, eps: float = 1e-4) -> Vector:
    """Return D of every candidate half-width from num_quantized_bins // 2 to the centre; +inf = infeasible."""
    centre = len(hist) // 2
    curve = []
    for half in range(num_quantized_bins // 2, centre + 1):
        start, stop = centre - half, centre + half + 1
        p = reference_distribution(hist, start, stop)
        sliced = hist[start:stop].astype(np.float64)
        sliced[0] = 0
        q = quantized_distribution(sliced, p, num_quantized_bins)
        smooth_p, smooth_q = smooth(p, eps), smooth(q, eps)
        if smooth_p is None or smooth_q is None:
            curve.append(math.inf)
        else:
            curve.append(kl_divergence(smooth_p, smooth_q))
    return np.array(curve)


def optimal_threshold(
    hist: NDArray[np.int64], edges: Vector, num_quantized_bins: int = 255, eps: float = 1e-4
) -> tuple[float, int]:
    """Return the threshold and the index of the first candidate that minimises the divergence."""
    curve = divergence_curve(hist, num_quantized_bins, eps)
    index = int(np.argmin(curve))
    if math.isinf(curve[index]):
        raise InfeasibleError(f"no feasible candidate among {len(curve)}")
    return float(edges[len(hist) // 2 + num_quantized_bins // 2 + index + 1]), index


def histogram(x: Vector, amax: float, num_bins: int) -> NDArray[np.int64]:
    """Count one value at a time; each bin reaches half a bin to both sides of its multiple of 2 amax / num_bins."""
    counts = np.zeros(num_bins, dtype=np.int64)
    for value in np.ravel(x):
        half_bins = math.floor(abs(float(value)) * (num_bins / amax))
        offset = min((half_bins + 1) // 2, num_bins // 2)
        counts[num_bins // 2 + (offset if value >= 0 else -offset)] += 1
    return counts
