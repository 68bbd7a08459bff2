"""The grid of each activation: a scale and, for an asymmetric range, a zero point."""

from collections.abc import Mapping
from typing import NamedTuple

from ..calibration import Calibration
from ..grid_thresholds import grid_thresholds
from ..ranges import Range, better_range, candidates
from ..thresholds import LayerThreshold
from .model.sites import Site, terms

INT8_BITS = 8
MIDDLE = 128  # the zero point of a symmetric grid, in 256 levels from 0
MAX_SUM = 2**31 - 1


class Grid(NamedTuple):
    """How an activation is rounded: x stands for ``(level - zero_point) * scale``."""

    scale: float
    num_bits: int = INT8_BITS
    zero_point: int = 0
    """From -128 to 127. If it is 0, the grid is symmetric and has no level -128."""

    @property
    def levels(self) -> tuple[int, int]:
        """Return the lowest and the highest level."""
        most = 2 ** (self.num_bits - 1) - 1
        return (-most - 1 if self.zero_point else -most), most

    @property
    def span(self) -> int:
        """Return the largest difference between a level and the zero point."""
        low, high = self.levels
        return max(self.zero_point - low, high - self.zero_point)


def make_grids(thresholds: Mapping[str, LayerThreshold], ranges: Mapping[str, Range]) -> dict[str, Grid]:
    """Return the grid of each tensor: over its range if it has one, else over [-T, T]."""
    return {
        name: Grid(ranges[name].scale, INT8_BITS, ranges[name].zero_point - MIDDLE)
        if name in ranges
        else Grid(layer.scale, layer.num_bits)
        for name, layer in thresholds.items()
    }


def asymmetric_ranges(
    calibration: Calibration, sites: Mapping[str, Site]
) -> tuple[dict[str, LayerThreshold], dict[str, Range]]:
    """Return the thresholds of a calibration, fitted to asymmetric grids, and the ranges that have less error.

    `sites` are the products by the name of each operand. Where INT32 may overflow, and with other numbers of bits than
    8, grids stay symmetric.
    """
    fits = {
        name: layer
        for name, layer in calibration.thresholds.items()
        if layer.num_bits == INT8_BITS and name in sites and terms(sites[name]) * 255**2 <= MAX_SUM
    }
    fitted = grid_thresholds(calibration._replace(thresholds=fits))
    found = {
        name: better_range([one], fitted[name].scale, MIDDLE)
        for name, one in candidates(calibration._replace(thresholds=fitted)).items()
    }
    return {**calibration.thresholds, **fitted}, {name: one for name, one in found.items() if one is not None}
