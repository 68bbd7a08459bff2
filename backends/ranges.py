"""Asymmetric ranges: [low, high] in 256 levels, one of them 0, for tensors whose values are not spread evenly about 0.

The range comes from the smallest and largest value and the histogram of a calibration, and T from its criterion.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

import klquant

from .calibration import Calibration
from .curves import Behind, Curve

STEPS = 255  # between 256 levels
NEARLY = 2  # levels from the middle: with such a zero point, the symmetric grid is as good


class Range(NamedTuple):
    """The values that a grid can represent, in units of the activation; 0 is among them."""

    low: float
    high: float

    @property
    def scale(self) -> float:
        """Return the step between two levels."""
        return (self.high - self.low) / STEPS

    @property
    def zero_point(self) -> int:
        """Return the level that stands for 0, from 0 to 255."""
        return round(-self.low / self.scale)


class Candidate(NamedTuple):
    """A range that a tensor may get, and what it costs there."""

    range: Range
    histogram: klquant.Histogram
    """Without the values that are exactly 0: they have no error."""
    curve: Curve | None = None
    """The functions that read the tensor, if nothing else does."""

    def error(self, scale: float, zero_point: int) -> float:
        """Return the expected error of a grid of 256 levels: behind the curve, if there is one."""
        if self.curve is None:
            return expected_error(self.histogram, scale, zero_point)
        return Behind.of(self.histogram, self.curve).error(scale, zero_point)


def union(ranges: Iterable[Range]) -> Range:
    """Return the smallest range that contains all of these.

    Parameters
    ----------
    ranges : iterable of Range

    Returns
    -------
    Range
    """
    lows, highs = zip(*ranges, strict=True)
    return Range(min(lows), max(highs))


def observed_range(threshold: float, low: float, high: float) -> Range:
    """Return the part of [-T, T] that has values, and 0.

    Parameters
    ----------
    threshold : float
        T.
    low, high : float
        Smallest and largest value of the tensor.

    Returns
    -------
    Range
    """
    return Range(max(min(low, 0.0), -threshold), min(max(high, 0.0), threshold))


def nearly_symmetric(wanted: Range) -> bool:
    """Return whether a symmetric grid is as good as this range, or the range is empty.

    Parameters
    ----------
    wanted : Range

    Returns
    -------
    bool
    """
    return wanted.high == wanted.low or abs(wanted.zero_point - STEPS / 2) < NEARLY


def expected_error(histogram: klquant.Histogram, scale: float, zero_point: int) -> float:
    """Return the mean squared error of rounding to 256 levels, and of clipping at their ends.

    Parameters
    ----------
    histogram : klquant.Histogram
        The values that are not 0.
    scale : float
        The step between two levels, in units of the edges.
    zero_point : int
        The level of 0, from 0 to 255.

    Returns
    -------
    float
        In squared units of the edges; 0 for an empty histogram.

    Notes
    -----
    Values are taken to be spread evenly over their bin. With u = x / scale and n(u) the nearest level, the squared
    error has the antiderivative F(u) = n / 12 + (u - n)^3 / 3, so the mean over a bin from a to b is
    (F(b) - F(a)) / (b - a). It holds for bins narrower and wider than a step, and beyond the ends.
    """
    u = np.asarray(histogram.edges, np.float64) / scale
    n = np.clip(np.rint(u), -zero_point, STEPS - zero_point)
    mean = np.diff(n / 12 + (u - n) ** 3 / 3) / np.diff(u)
    return float((histogram.hist * mean).sum()) / max(int(histogram.hist.sum()), 1) * scale**2


def candidates(calibration: Calibration, curves: Mapping[str, Curve] | None = None) -> dict[str, Candidate]:
    """Return the asymmetric range that each tensor may get.

    Parameters
    ----------
    calibration : Calibration
        With thresholds. If it is from an older file, without ranges, the result is empty.
    curves : mapping, optional
        The functions that read a tensor, by its name, if nothing else reads it.

    Returns
    -------
    dict
        By tensor name, without those that have a given T or no values but 0.
    """
    found = {}
    for name, layer in calibration.thresholds.items():
        known = name in calibration.ranges and name in calibration.histograms
        if known and layer.criterion != "fixed":
            values = without_zeros(calibration.histograms[name], calibration.zeros.get(name))
            wanted = observed_range(layer.threshold, *calibration.ranges[name])
            found[name] = Candidate(wanted, values, (curves or {}).get(name))
    return found


def better_range(group: Iterable[Candidate], scale: float, zero_point: int) -> Range | None:
    """Return the union of the ranges of tensors that share a grid, if it has less error than the symmetric grid.

    Parameters
    ----------
    group : iterable of Candidate
        The tensors.
    scale, zero_point : float, int
        Of the symmetric grid, in 256 levels.

    Returns
    -------
    Range or None
    """
    group = list(group)
    wanted = union(one.range for one in group)
    if nearly_symmetric(wanted):
        return None
    ours, theirs = (
        sum(one.error(*grid) for one in group) for grid in ((wanted.scale, wanted.zero_point), (scale, zero_point))
    )
    return wanted if ours < theirs else None


def without_zeros(histogram: klquant.Histogram, zeros: int | None) -> klquant.Histogram:
    """Return a histogram without exact zeros; if their number is unknown, without its centre bin.

    Parameters
    ----------
    histogram : klquant.Histogram
    zeros : int or None
        How many values are exactly 0.

    Returns
    -------
    klquant.Histogram
    """
    hist = np.array(histogram.hist)
    centre = len(hist) // 2
    hist[centre] = 0 if zeros is None else max(int(hist[centre]) - zeros, 0)
    return klquant.Histogram(hist, histogram.edges)
