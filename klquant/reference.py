"""The algorithm in plain loops over NumPy float64: the oracle for tests of the fast search.

It shares no code with the fast search, and each line can be compared with the description by eye. It takes seconds
where the fast search takes milliseconds.
"""

import math

import numpy as np
from numpy.typing import NDArray

from klquant.errors import InfeasibleError

__all__ = [
    "divergence_curve",
    "histogram",
    "kl_divergence",
    "near_ties",
    "one_sided_divergence_curve",
    "optimal_threshold",
    "percentile",
    "quantized_distribution",
    "reference_distribution",
    "smooth",
    "squared_errors",
]


def __dir__() -> list[str]:
    return __all__


Vector = NDArray[np.float64]


def _widened(hist: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the counts in 64 bits. Sums of narrower ones would wrap around."""
    return hist.astype(np.float64 if hist.dtype.kind == "f" else np.int64)


def smooth(values: Vector, eps: float = 1e-4) -> Vector | None:
    """Replace zeros by `eps` and subtract the cost evenly from the other entries; return None if that is infeasible."""
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
    """Return sum p log(p / q) of the normalised distributions, in nats."""
    p, q = p / p.sum(), q / q.sum()
    return math.fsum(pk * math.log(pk / qk) for pk, qk in zip(p.tolist(), q.tolist(), strict=True) if pk > 0)


def reference_distribution(hist: NDArray[np.int64], start: int, stop: int) -> Vector:
    """Return P: the window of the histogram with the outliers added to its end bins."""
    hist = _widened(hist)
    p = hist[start:stop].astype(np.float64)
    p[0] = hist[: start + 1].sum()
    p[-1] = hist[stop - 1] + hist[stop:].sum()
    return p


def quantized_distribution(values: Vector, support: Vector, num_quantized_bins: int = 255) -> Vector:
    """Merge `values` into groups and spread the total of each over its bins with non-zero `support`."""
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
    """Return D of every half-width from num_quantized_bins // 2 to the centre; +inf if infeasible."""
    centre = len(hist) // 2
    curve = []
    for half in range(num_quantized_bins // 2, centre + 1):
        start, stop = centre - half, centre + half + 1
        p = reference_distribution(hist, start, stop)
        sliced = hist[start:stop].astype(np.float64)
        sliced[0] = 0
        q = quantized_distribution(sliced, p, num_quantized_bins)
        curve.append(_smoothed_divergence(p, q, eps))
    return np.array(curve)


def _smoothed_divergence(p: Vector, q: Vector, eps: float) -> float:
    smooth_p, smooth_q = smooth(p, eps), smooth(q, eps)
    return math.inf if smooth_p is None or smooth_q is None else kl_divergence(smooth_p, smooth_q)


def one_sided_divergence_curve(hist: NDArray[np.int64], num_quantized_bins: int = 255, eps: float = 1e-4) -> Vector:
    """Return D of every candidate of the search on ``|x|``, with the levels 0 to num_quantized_bins // 2.

    There are no outliers on the left, so S has the first bin too.
    """
    hist, centre, levels = _widened(hist), len(hist) // 2, num_quantized_bins // 2 + 1
    folded = np.array([hist[centre], *(hist[centre - k] + hist[centre + k] for k in range(1, centre + 1))])
    curve = []
    for width in range(levels, centre + 2):
        sliced = folded[:width].astype(np.float64)
        p = sliced.copy()
        p[-1] += folded[width:].sum()
        curve.append(_smoothed_divergence(p, quantized_distribution(sliced, p, levels), eps))
    return np.array(curve)


def squared_errors(hist: NDArray[np.int64], edges: Vector, num_quantized_bins: int = 255) -> Vector:
    """Return the mean squared error of quantization for each positive edge as T, with values at their bins' centres."""
    qmax, centre = num_quantized_bins // 2, len(hist) // 2
    errors, total = [], float(_widened(hist).sum())
    for threshold in edges[centre + 1 :]:
        step, error = threshold / qmax, 0.0
        for count, low, high in zip(hist.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            x = (low + high) / 2
            level = min(max(round(x / step), -qmax), qmax)
            error += count * (x - level * step) ** 2
        errors.append(error / total)
    return np.array(errors)


def percentile(hist: NDArray[np.int64], edges: Vector, percent: float) -> float:
    """Return the T with `percent` of the mass of ``|x|`` below it, interpolated linearly inside its bin."""
    hist, centre = _widened(hist), len(hist) // 2
    folded = [float(hist[centre]), *(float(hist[centre - k] + hist[centre + k]) for k in range(1, centre + 1))]
    target, below = percent / 100 * sum(folded), 0.0
    for k, count in enumerate(folded):
        if count > 0 and below + count >= target:
            low = float(edges[centre + k]) if k else 0.0
            return low + (target - below) / count * (float(edges[centre + k + 1]) - low)
        below += count
    raise InfeasibleError("`hist` must have counts, got an empty histogram")


def near_ties(curve: Vector, width: float) -> list[int]:
    """Return the candidates whose divergence is at most `width` of the least above it."""
    least = min(curve)
    return [k for k, divergence in enumerate(curve) if math.isfinite(divergence) and divergence <= least * (1 + width)]


def optimal_threshold(
    hist: NDArray[np.int64],
    edges: Vector,
    num_quantized_bins: int = 255,
    eps: float = 1e-4,
    tie_width: float = 0.0,
) -> tuple[float, int]:
    """Return the threshold and the index of the first candidate that minimises the divergence.

    With a `tie_width`, return the candidate with the least squared error among the near-ties.
    """
    curve = divergence_curve(hist, num_quantized_bins, eps)
    index = int(np.argmin(curve))
    if math.isinf(curve[index]):
        raise InfeasibleError(f"`hist` must have a feasible candidate, got none among {len(curve)}")
    if tie_width:
        errors = squared_errors(hist, edges, num_quantized_bins)[-len(curve) :]
        index = min(near_ties(curve, tie_width), key=lambda k: errors[k])
    return float(edges[len(hist) // 2 + num_quantized_bins // 2 + index + 1]), index


def histogram(x: Vector, amax: float, num_bins: int) -> NDArray[np.int64]:
    """Count one value at a time. The centres of the bins are multiples of 2 amax / num_bins."""
    counts = np.zeros(num_bins, dtype=np.int64)
    for value in np.ravel(x):
        half_bins = math.floor(abs(float(value)) * (num_bins / amax))
        offset = min((half_bins + 1) // 2, num_bins // 2)
        counts[num_bins // 2 + (offset if value >= 0 else -offset)] += 1
    return counts
