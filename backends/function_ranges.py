"""Ranges for tensors that are read by pointwise functions only: those with the least error behind the functions."""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from .calibration import Calibration
from .curves import Behind, Curve
from .grid_thresholds import GAIN_DB
from .ranges import STEPS, Range, observed_range, without_zeros
from .thresholds import LayerThreshold

SHRINK = tuple(0.8**k for k in range(12))
"""Ends of ranges to try, as parts of the observed ones."""
ROUNDS = 3  # in which low and high are chosen by turns


def function_ranges(calibration: Calibration, curves: Mapping[str, Curve]) -> Calibration:
    """Return a calibration with ranges and thresholds fitted to what reads the tensors.

    Parameters
    ----------
    calibration : Calibration
        With thresholds. Those that are given stay as they are, like those of files without ranges.
    curves : mapping
        The functions that read a tensor, by its name, if nothing else reads it.

    Returns
    -------
    Calibration
        Where [low, high] has at least 1 dB less error behind the functions than the range of T, that is the range and
        T = max(-low, high); `criterion` is "fitted" and the numbers about T are NaN. Only where the guard watches over
        T, [low, high] may be wider than the range of T.
    """
    thresholds, ranges = dict(calibration.thresholds), dict(calibration.ranges)
    for name, curve in curves.items():
        layer, known = thresholds.get(name), name in ranges and name in calibration.histograms
        if layer is None or not known or layer.criterion == "fixed" or layer.num_bits != 8:
            continue
        values = without_zeros(calibration.histograms[name], calibration.zeros.get(name))
        start = observed_range(layer.threshold, *ranges[name])
        whole = observed_range(math.inf, *ranges[name]) if _movable(layer) else start
        found = _Search(Behind.of(values, curve), start, whole).best()
        if found != start:
            ranges[name] = found.low, found.high
            largest = max(-found.low, found.high)
            thresholds[name] = LayerThreshold(
                layer.amax, largest, criterion="fitted", divergence=math.nan, clipped=math.nan, guarded=layer.guarded
            )
    return calibration._replace(thresholds=thresholds, ranges=ranges)


def _movable(layer: LayerThreshold) -> bool:
    """Return whether T may grow: entropy chose it for [-T, T], or it is fitted to another grid already."""
    return layer.guarded or layer.criterion == "fitted"


class _Search(NamedTuple):
    """A search for the ends of a range."""

    behind: Behind
    start: Range
    whole: Range
    """Which contains all that are tried."""

    def best(self) -> Range:
        """Return the start if no range gains enough, else the widest that is nearly as good as the best."""
        if not self.start.high > self.start.low:
            return self.start
        least = self._least()
        limit = self._error(*least) * 10 ** (GAIN_DB / 10)
        if self._error(*self.start) <= limit:
            return self.start
        high = max(one for one in self._highs() if self._error(least.low, one) <= limit)
        return Range(min(one for one in self._lows() if self._error(one, high) <= limit), high)

    def _least(self) -> Range:
        low, high = self.start
        for _ in range(ROUNDS):
            before = low, high
            low = min(self._lows(), key=lambda one: self._error(one, high))
            high = min(self._highs(), key=lambda one: self._error(low, one))
            if before == (low, high):
                break
        return Range(low, high)

    def _lows(self) -> Iterator[float]:
        yield from (self.start.low, *(part * self.whole.low for part in SHRINK), 0.0)

    def _highs(self) -> Iterator[float]:
        yield from (self.start.high, *(part * self.whole.high for part in SHRINK), 0.0)

    def _error(self, low: float, high: float) -> float:
        if not high > low:
            return math.inf
        return self.behind.error((high - low) / STEPS, Range(low, high).zero_point)
