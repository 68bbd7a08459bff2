"""From histograms to one threshold for every layer."""

import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

import klquant
from klquant.errors import CalibrationWarning, InfeasibleError, InvalidInputError, KLQuantError

from .guard import overclipped
from .settings import CRITERIA, Criterion, LayerOptions
from .warning import warn

MAX_MSE = 2**26  # a search by mse takes some ten bytes for each bin and level
Array: TypeAlias = "np.ndarray[Any, Any]"
_GENERAL = LayerOptions("entropy", 8, "inputs", min_ratio=0.0, percentile=99.99)


class LayerThreshold(NamedTuple):
    """How the activations of one layer are clipped."""

    amax: float
    """Largest absolute value observed."""
    threshold: float
    """T, in units of the activation."""
    divergence: float
    """KL divergence at T in nats; NaN for other criteria than entropy, and where no search was made."""
    clipped: float
    """Share of all observed values beyond T."""
    sqnr_db: float = math.nan
    """Expected signal to quantization noise ratio of the tensor at T, in dB."""
    criterion: str = "entropy"
    """How T was chosen; `fixed` where it was given, `none` where there was nothing to choose from."""
    num_bits: int = 8
    """Of the activations and the weights."""

    @property
    def scale(self) -> float:
        """Return the step between two levels, T / 127 for INT8."""
        return self.threshold / float(2 ** (self.num_bits - 1) - 1)


def search_thresholds(
    amax: Mapping[str, float],
    histograms: Mapping[str, klquant.Histogram],
    *,
    criterion: Criterion = "entropy",
    options: Mapping[str, LayerOptions] | None = None,
) -> dict[str, LayerThreshold]:
    """Choose the clipping threshold of every observed tensor.

    Parameters
    ----------
    amax, histograms : mapping
        What was observed. The histograms are not changed: the centre bin, which holds the zeros, is cleared in a
        copy before the search.
    criterion : {"entropy", "max", "percentile", "mse"}
        Minimise the KL divergence, take amax, take the 99.99th percentile of the non-zero values, or minimise the
        expected squared error.
    options : mapping, optional
        What holds for single layers, by qualified name.

    Returns
    -------
    dict
        A LayerThreshold by qualified layer name.

    Raises
    ------
    InvalidInputError
        For another criterion, a layer without a histogram, more levels than bins; naming the layer.

    Warns
    -----
    CalibrationWarning
        Naming the layer, for a tensor that is always 0 (it gets scale 1), for one where no threshold is feasible
        (it gets T = amax), and where T clips so hard that another criterion should be tried.
    """
    check_criterion(criterion)
    general = LayerOptions(criterion).over(_GENERAL)
    found = {}
    for name, largest in amax.items():
        chosen = (options or {}).get(name, LayerOptions()).over(general)
        found[name], complaint = _search(name, largest, histograms.get(name), chosen)
        if complaint:
            warn(f"layer `{name}`: {complaint}")
    return found


def check_criterion(criterion: str) -> None:
    """Raise InvalidInputError for an unknown criterion."""
    if criterion not in CRITERIA:
        raise InvalidInputError(f"`criterion` must be one of {', '.join(CRITERIA)}, got {criterion!r}")


def candidate_thresholds(
    amax: Mapping[str, float], histograms: Mapping[str, klquant.Histogram], options: Mapping[str, LayerOptions]
) -> dict[str, dict[str, LayerThreshold]]:
    """Return the thresholds by criterion and layer, for one to be chosen; nothing is warned of yet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        return {name: search_thresholds(amax, histograms, criterion=name, options=options) for name in CRITERIA}


def _search(
    name: str, amax: float, histogram: klquant.Histogram | None, options: LayerOptions
) -> tuple[LayerThreshold, str]:
    """Return the threshold of one layer, and what a person should look at."""
    bits = int(options.num_bits or 8)
    if amax == 0:
        one = float(2 ** (bits - 1) - 1)
        return LayerThreshold(0.0, one, math.nan, 0.0, math.inf, "none", bits), "all its values are 0; it gets scale 1"
    if histogram is None:
        raise InvalidInputError(f"layer `{name}` has an amax and no histogram; collect both from the same data")
    hist = np.array(histogram.hist)
    total, hist[len(hist) // 2] = hist.sum().item(), 0
    try:
        found = _evaluate(hist, histogram.edges, options)
        layer = _layer_threshold(found, amax, hist.sum().item() / total, options, bits)
        return layer, _overclipped(layer, hist, histogram.edges)
    except InfeasibleError:
        layer = LayerThreshold(amax, amax, math.nan, 0.0, math.nan, "none", bits)
        return layer, f"no threshold is feasible; it gets T = amax = {amax}"
    except KLQuantError as error:
        raise type(error)(f"layer `{name}`: {error}") from error


def _evaluate(hist: Array, edges: Array, options: LayerOptions) -> klquant.Threshold:
    levels = 2 ** int(options.num_bits or 8) - 1
    if options.threshold is not None:
        return _at(hist, edges, options.threshold, levels)
    if options.criterion == "entropy":
        return klquant.optimal_threshold(hist, edges, num_quantized_bins=levels, min_ratio=options.min_ratio or 0.0)
    if options.criterion == "percentile":
        percentile = options.percentile or 99.99
        return klquant.percentile_threshold(hist, edges, num_quantized_bins=levels, percentile=percentile)
    if options.criterion == "max":
        return klquant.max_threshold(hist, edges, num_quantized_bins=levels)
    if len(hist) * levels > MAX_MSE:
        raise InvalidInputError(f"the mse criterion takes {MAX_MSE} bins x levels at most, got {len(hist)} x {levels}")
    return klquant.mse_threshold(hist, edges, num_quantized_bins=levels)


def _at(hist: Array, edges: Array, value: float, levels: int) -> klquant.Threshold:
    """Return what a T that was given does to the histogram, with all values at their bins' centres."""
    if not hist.any():
        return klquant.Threshold(value, -1, math.nan, 0.0, math.nan)
    centres = (edges[1:] + edges[:-1]) / 2
    noise = centres - klquant.fake_quantize(centres, value / (levels // 2), num_quantized_bins=levels)
    signal, lost = (max(float((hist * values**2).sum()), 1e-300) for values in (centres, noise))
    with np.errstate(over="ignore"):  # of bins far narrower than the distance to T: infinitely many lie between
        beyond = np.clip((np.maximum(edges[1:], -edges[:-1]) - value) / np.diff(edges), 0, 1)
    share = (hist * beyond).sum() / hist.sum()
    return klquant.Threshold(value, -1, math.nan, share, 10 * math.log10(signal / lost))


def _layer_threshold(
    found: klquant.Threshold, amax: float, share: float, options: LayerOptions, bits: int
) -> LayerThreshold:
    """Return the result of a search among a `share` of all values: the others are zeros."""
    criterion = str(options.criterion) if options.threshold is None else "fixed"
    value = amax if criterion == "max" else float(found.value)
    clipped = float(found.clipped) * share
    return LayerThreshold(amax, value, float(found.divergence), clipped, float(found.sqnr_db), criterion, bits)


def _overclipped(layer: LayerThreshold, hist: Array, edges: Array) -> str:
    """Return a complaint where another criterion would clip less and keep more."""
    if layer.criterion not in ("entropy", "percentile"):
        return ""
    others: list[Criterion] = ["max"] if len(hist) * 2**layer.num_bits > MAX_MSE else ["mse", "max"]
    found = {name: _evaluate(hist, edges, LayerOptions(name, layer.num_bits)).sqnr_db for name in others}
    return overclipped(
        amax=layer.amax,
        threshold=layer.threshold,
        clipped=layer.clipped,
        sqnr_db=layer.sqnr_db,
        alternatives={k: float(v) for k, v in found.items()},
    )
