"""The histogram of a tensor without the zeros, and what each criterion finds in it."""

import math
from typing import Any, NamedTuple, TypeAlias

import numpy as np

import klquant
from klquant.errors import InvalidInputError

from .guard import CROWDED
from .plugins import load
from .settings import LayerOptions

MAX_MSE = 2**26  # bins x levels: the mse search takes about ten bytes for each
Array: TypeAlias = "np.ndarray[Any, Any]"


class Hidden(NamedTuple):
    """What the histogram of a tensor does not show."""

    zeros: int | None = None
    """How many values are exactly 0; None if unknown: then the whole centre bin counts as zeros."""
    beyond: int = 0
    """How many values lie beyond the range; the end bins hold them."""
    max_amax: float = math.inf
    """The cap on the range."""


class Seen(NamedTuple):
    """A histogram prepared for the search: the centre bin is 0."""

    amax: float
    hist: Array
    edges: Array
    total: int
    """Of all values."""
    small: int
    """Values of the centre bin that are not 0."""
    hidden: Hidden

    @classmethod
    def of(cls, amax: float, histogram: klquant.Histogram, hidden: Hidden) -> "Seen":
        """Return a histogram without its centre bin, and without changing it."""
        hist = np.array(histogram.hist)
        total, centre = hist.sum().item(), int(hist[len(hist) // 2])
        hist[len(hist) // 2] = 0
        small = 0 if hidden.zeros is None else max(centre - hidden.zeros, 0)
        return cls(amax, hist, histogram.edges, total, small, hidden)

    @property
    def top(self) -> float:
        """Return the largest T that makes sense: amax, or the cap."""
        return min(self.amax, self.hidden.max_amax)

    @property
    def width(self) -> float:
        """Return the width of a bin."""
        return float(2 * self.edges[-1] / len(self.hist))

    def sqnr_db(self, found: klquant.Threshold, levels: int) -> float:
        """Return the expected SQNR with the small values of the centre bin, spread evenly over it."""
        if not self.small:
            return float(found.sqnr_db)
        centres = (self.edges[1:] + self.edges[:-1]) / 2
        signal = float((self.hist * centres**2).sum())
        noise = signal / 10 ** (float(found.sqnr_db) / 10)
        step = min(float(found.value) / (levels // 2), self.width)  # with wider steps they become 0
        signal, noise = signal + self.small * self.width**2 / 12, noise + self.small * step**2 / 12
        return 10 * math.log10(signal / noise) if noise else math.inf

    def complaint(self) -> str:
        """Return what is wrong with the range; empty if nothing is."""
        nonzero, complaints = self.hist.sum().item() + self.small, []
        if self.small > CROWDED * nonzero:
            complaints.append(
                f"{self.small / nonzero:.1%} of its non-zero values are in the centre bin, below {self.width / 2:.4g}: "
                f"amax = {self.amax:.4g} is an outlier, and no T resolves them; pass a smaller max_amax, or a threshold"
            )
        if self.amax > self.hidden.max_amax:
            complaints.append(
                f"amax = {self.amax:.4g} exceeds max_amax = {self.hidden.max_amax:.4g}: "
                f"{self.hidden.beyond / self.total:.2%} of its values lie beyond and are clipped"
            )
        elif self.hidden.beyond:
            complaints.append(
                f"{self.hidden.beyond} of its values are outliers beyond {self.edges[-1]:.4g}, up to {self.amax:.4g}: "
                "clipped so that the others are resolved; criterion 'max' keeps them"
            )
        return "; ".join(complaints)


def evaluate(seen: Seen, options: LayerOptions) -> klquant.Threshold:
    """Return the T that the options ask for; raise InfeasibleError if there is none."""
    hist, edges, levels = seen.hist, seen.edges, 2 ** int(options.num_bits or 8) - 1
    if options.threshold is not None:
        return _at(hist, edges, options.threshold, levels)
    if options.criterion == "entropy":
        return klquant.optimal_threshold(hist, edges, num_quantized_bins=levels, min_ratio=options.min_ratio or 0.0)
    if options.criterion == "percentile":
        percentile = options.percentile or 99.99
        return klquant.percentile_threshold(hist, edges, num_quantized_bins=levels, percentile=percentile)
    if options.criterion == "max":
        at_end = klquant.max_threshold(hist, edges, num_quantized_bins=levels)
        return at_end if seen.top <= edges[-1] else _at(hist, edges, seen.top, levels)
    if options.criterion not in (None, "mse"):
        found = load("criteria", str(options.criterion))(hist, edges, num_quantized_bins=levels)
        return found if isinstance(found, klquant.Threshold) else _at(hist, edges, float(found), levels)
    if len(hist) * levels > MAX_MSE:
        raise InvalidInputError(f"the mse criterion takes at most {MAX_MSE} bins x levels, got {len(hist)} x {levels}")
    return klquant.mse_threshold(hist, edges, num_quantized_bins=levels)


def _at(hist: Array, edges: Array, value: float, levels: int) -> klquant.Threshold:
    """Return the result for a given T, with all values taken at the centres of their bins."""
    if not hist.any():
        return klquant.Threshold(value, -1, math.nan, 0.0, math.nan)
    centres = (edges[1:] + edges[:-1]) / 2
    noise = centres - klquant.fake_quantize(centres, value / (levels // 2), num_quantized_bins=levels)
    signal, lost = (max(float((hist * values**2).sum()), 1e-300) for values in (centres, noise))
    with np.errstate(over="ignore"):  # bins may be far narrower than their distance to T
        beyond = np.clip((np.maximum(edges[1:], -edges[:-1]) - value) / np.diff(edges), 0, 1)
    share = (hist * beyond).sum() / hist.sum()
    return klquant.Threshold(value, -1, math.nan, share, 10 * math.log10(signal / lost))
