"""Histograms and divergence curves, reduced to what a screen can show."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

import klquant
from klquant.errors import InfeasibleError

Array: TypeAlias = "np.ndarray[Any, Any]"
MAX_BARS = 400  # on each side of 0; a screen cannot show more
MAX_POINTS = 400


class Bars(NamedTuple):
    """A histogram with fewer, wider bars. Each is a sum of bins, so every value is still counted once.

    The centre bin, which holds the zeros, is a bar by itself. On each side of it every `bins_per_bar` bins make a bar,
    from the centre outwards: bar k > 0 ends at ``(1/2 + min(k * bins_per_bar, num_bins // 2)) * bin_width``.
    """

    bin_width: float
    """Of the collected histogram, in units of the activation."""
    num_bins: int
    """Of the collected histogram."""
    bins_per_bar: int
    counts: list[int]
    """From the most negative bar to the most positive."""


class Curve(NamedTuple):
    """The divergence at fewer candidates: the lowest of each group of neighbours, so that the minimum is kept."""

    candidates_per_point: int
    thresholds: list[float]
    """T of the feasible candidates, in units of the activation."""
    divergences: list[float]
    """In nats."""
    tie_low: float
    """Smallest T among all candidates with a divergence at most 1 % above the least; NaN if none is feasible."""
    tie_high: float
    """Largest T among them. A wide range means that little data may move T a lot."""


def sum_bars(histogram: klquant.Histogram) -> Bars:
    """Return a histogram as at most 400 bars on each side of the centre bin."""
    hist, edges = histogram
    half = len(hist) // 2
    each = -(-half // MAX_BARS)
    starts = np.arange(0, half, each)
    left, right = (np.add.reduceat(side, starts) for side in (hist[:half][::-1], hist[half + 1 :]))
    counts = [*left[::-1].tolist(), int(hist[half]), *right.tolist()]
    return Bars(float(edges[-1] - edges[0]) / len(hist), len(hist), each, counts)


def thin_curve(histogram: klquant.Histogram, *, num_quantized_bins: int) -> Curve:
    """Return the divergence curve of a search without the zeros, at no more than 400 candidates."""
    hist, edges = np.array(histogram.hist), histogram.edges
    hist[len(hist) // 2] = 0
    curve = klquant.divergence_curve(hist, edges, num_quantized_bins=num_quantized_bins)
    thresholds, each = edges[-len(curve) :], -(-len(curve) // MAX_POINTS)
    lowest = [start + int(curve[start : start + each].argmin()) for start in range(0, len(curve), each)]
    kept = [k for k in lowest if np.isfinite(curve[k])]
    try:
        best = klquant.optimal_threshold(hist, edges, num_quantized_bins=num_quantized_bins)
        ends = short(np.array([best.tie_low, best.tie_high]))
    except InfeasibleError:
        ends = [math.nan] * 2
    return Curve(each, short(thresholds[kept]), short(curve[kept]), *ends)


def sparkline(bars: Bars, *, width: int = 80, height: int = 18, steps: int = 40) -> str:
    """Return the outline of the bars as an SVG path. Heights are logarithms of the counts."""
    half = bars.num_bins // 2
    ends = np.minimum(np.arange(len(bars.counts) // 2 + 1) * bars.bins_per_bar, half)
    middles = np.concatenate([[0], (ends[1:] + ends[:-1] + 1) / 2])
    counts, _ = np.histogram(
        np.concatenate([-middles[:0:-1], middles]), steps, (-half - 0.5, half + 0.5), weights=bars.counts
    )
    return outline(np.log1p(counts), width=width, height=height)


def outline(values: Iterable[float], *, width: int = 80, height: int = 18) -> str:
    """Return values as an SVG path of steps above a base line."""
    scaled = np.array(list(values), np.float64)
    tops = height - scaled / (scaled.max() or 1.0) * (height - 1)
    step = width / len(tops)
    return f"M0 {height}" + "".join(f"V{top:.3g}h{step:.3g}" for top in tops) + f"V{height}z"


def short(values: Array) -> list[float]:
    """Return the numbers rounded to six digits, which is enough to draw them and keeps files small."""
    return [float(f"{value:.6g}") for value in values]
