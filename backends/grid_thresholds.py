"""Thresholds for the grid that an engine uses, where that has more levels for a tensor than [-T, T] has.

Criteria search T for 255 levels over [-T, T]. A tensor with few negative values, or none, gets twice as many levels for
the others: then a wider T costs less.
"""

import math
from collections.abc import Collection

import klquant
from klquant.errors import KLQuantError

from .calibration import Calibration
from .observed import Seen, evaluate
from .ranges import expected_error, nearly_symmetric, observed_range, without_zeros
from .settings import LayerOptions
from .thresholds import LayerThreshold

GAIN_DB = 1.0
"""How much less error another T must promise, and how much more a wider T than the best may cost.

On six trained networks (onnxruntime, held-back data), T as searched gives 20.0 dB at the outputs on average; the best T
by expected error 19.9, the largest within 1 dB of it 19.9, and that only where it gains 1 dB 21.7.
"""


def grid_thresholds(calibration: Calibration, symmetric: Collection[str] = ()) -> dict[str, LayerThreshold]:
    """Return the thresholds of a calibration, fitted to grids with a zero point.

    Parameters
    ----------
    calibration : Calibration
        With thresholds. Those that the guard does not watch over stay as they are, like those of files without ranges.
    symmetric : collection of str
        Tensors that keep a symmetric grid if they have negative values.

    Returns
    -------
    dict
        A LayerThreshold by tensor name. Where T changed, `criterion` is "fitted" and the numbers about T are NaN.
    """
    found = dict(calibration.thresholds)
    for name, layer in found.items():
        if layer.guarded and layer.num_bits == 8 and name in calibration.ranges and name in calibration.histograms:
            wanted = _fitted(calibration, name, layer, symmetric=name in symmetric)
            if wanted != layer.threshold:
                found[name] = LayerThreshold(
                    layer.amax, wanted, criterion="fitted", divergence=math.nan, clipped=math.nan
                )
    return found


def _fitted(calibration: Calibration, name: str, layer: LayerThreshold, *, symmetric: bool) -> float:
    """Return the T of the criterion, or if another gains enough, the largest that is nearly as good as the best."""
    ends = calibration.ranges[name]
    values = without_zeros(calibration.histograms[name], calibration.zeros.get(name))
    errors = {
        T: _grid_error(values, T, ends, symmetric=symmetric and ends[0] < 0)
        for T in {layer.threshold, *_others(calibration, name, layer)}
    }
    limit = min(errors.values()) * 10 ** (GAIN_DB / 10)
    return layer.threshold if errors[layer.threshold] <= limit else max(T for T in errors if errors[T] <= limit)


def _others(calibration: Calibration, name: str, layer: LayerThreshold) -> list[float]:
    """Return the T of mse and max."""
    seen = Seen.of(layer.amax, calibration.histograms[name], calibration.hidden[name])
    try:
        return [seen.top, float(evaluate(seen, LayerOptions("mse", layer.num_bits)).value)]
    except KLQuantError:  # too many bins, or no values but those of the centre bin
        return [seen.top]


def _grid_error(values: klquant.Histogram, threshold: float, ends: tuple[float, float], *, symmetric: bool) -> float:
    """Return the expected squared error of the better one of the two grids."""
    error = expected_error(values, threshold / 127, 128)
    wanted = observed_range(threshold, *ends)
    if symmetric or nearly_symmetric(wanted):
        return error
    return min(error, expected_error(values, wanted.scale, wanted.zero_point))
