"""From histograms to one threshold for every layer."""

import math
import warnings
from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

import klquant
from klquant.errors import CalibrationWarning, InfeasibleError, InvalidInputError

Criterion: TypeAlias = Literal["entropy", "max", "percentile", "mse"]
_SEARCHES = {
    "entropy": klquant.optimal_threshold,
    "max": klquant.max_threshold,
    "percentile": klquant.percentile_threshold,
    "mse": klquant.mse_threshold,
}


class LayerThreshold(NamedTuple):
    """How the activations of one layer are clipped."""

    amax: float
    """Largest absolute value observed."""
    threshold: float
    """T, in units of the activation; the scale is T / 127."""
    divergence: float
    """KL divergence at T in nats; NaN for other criteria than entropy, and where no search was made."""
    clipped: float
    """Share of all observed values beyond T."""
    sqnr_db: float = math.nan
    """Expected signal to quantization noise ratio of the tensor at T, in dB."""


def search_thresholds(
    amax: Mapping[str, float], histograms: Mapping[str, klquant.Histogram], *, criterion: Criterion = "entropy"
) -> dict[str, LayerThreshold]:
    """Choose the clipping threshold of every observed tensor.

    Parameters
    ----------
    amax, histograms : mapping
        The results of passes 1 and 2. The histograms are not changed: the centre bin, which holds the zeros, is
        cleared in a copy before the search.
    criterion : {"entropy", "max", "percentile", "mse"}
        Minimise the KL divergence, take amax, take the 99.99th percentile of the non-zero values, or minimise the
        expected squared error.

    Returns
    -------
    dict
        A LayerThreshold by qualified layer name.

    Warns
    -----
    CalibrationWarning
        Naming the layer, for a tensor that is always 0 (it gets scale 1) and for one where no threshold is
        feasible (it gets T = amax).
    """
    if criterion not in _SEARCHES:
        raise InvalidInputError(f"`criterion` must be one of {', '.join(_SEARCHES)}, got {criterion!r}")
    thresholds = {}
    for name, largest in amax.items():  # a comprehension would be a frame of its own, and the warnings point there
        thresholds[name] = _search(name, largest, histograms.get(name), criterion)
    return thresholds


def _search(name: str, amax: float, histogram: klquant.Histogram | None, criterion: Criterion) -> LayerThreshold:
    if amax == 0:
        _warn(name, "all its values are 0; it gets scale 1")
        return LayerThreshold(0.0, 127.0, float("nan"), 0.0, float("inf"))
    if histogram is None:
        raise InvalidInputError(f"layer `{name}` has an amax and no histogram; collect both from the same data")
    hist = np.array(histogram.hist)
    zeros, hist[len(hist) // 2] = hist[len(hist) // 2], 0
    try:
        found = _SEARCHES[criterion](hist, histogram.edges)
    except InfeasibleError:
        _warn(name, f"no threshold is feasible; it gets T = amax = {amax}")
        return LayerThreshold(amax, amax, float("nan"), 0.0, float("nan"))
    share = 1 - int(zeros) / int(histogram.hist.sum())  # of the values that took part in the search
    clipped, threshold = float(found.clipped) * share, amax if criterion == "max" else float(found.value)
    return LayerThreshold(amax, threshold, float(found.divergence), clipped, float(found.sqnr_db))


def _warn(name: str, what: str) -> None:
    warnings.warn(f"layer `{name}`: {what}", CalibrationWarning, stacklevel=4)
