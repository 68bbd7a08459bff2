"""From histograms to one threshold for every layer."""

import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

import klquant
from klquant.errors import CalibrationWarning, InfeasibleError, InvalidInputError, KLQuantError

from .guard import CROWDED, overclipped
from .settings import CRITERIA, Criterion, LayerOptions
from .warning import warn

MAX_MSE = 2**26  # bins x levels: the mse search takes about ten bytes for each
Array: TypeAlias = "np.ndarray[Any, Any]"
SHOWN = 3  # layers that warnings name
_GENERAL = LayerOptions("entropy", 8, "inputs", min_ratio=0.0, percentile=99.99)


class LayerThreshold(NamedTuple):
    """The clipping threshold of one layer's activations."""

    amax: float
    """Largest absolute value observed."""
    threshold: float
    """T, in units of the activation."""
    divergence: float
    """KL divergence at T in nats; NaN for criteria other than entropy, and without a search."""
    clipped: float
    """Share of all observed values beyond T."""
    sqnr_db: float = math.nan
    """Expected signal to quantization noise ratio of the tensor at T, in dB."""
    criterion: str = "entropy"
    """How T was chosen: `fixed` if it was given, `none` if there was no choice."""
    num_bits: int = 8
    """Of the activations and the weights."""

    @property
    def scale(self) -> float:
        """Return the step between two levels, T / 127 for INT8."""
        return self.threshold / float(2 ** (self.num_bits - 1) - 1)


class Complaint(NamedTuple):
    """What the user should know about the threshold of a layer."""

    text: str = ""
    better: str = ""
    """A criterion that expects less error, if there is one."""
    loss_db: float = 0.0
    """How much more SQNR that one expects."""


class Hidden(NamedTuple):
    """What the histogram of a tensor does not show."""

    zeros: int | None = None
    """How many values are exactly 0; None if unknown: then the whole centre bin counts as zeros."""
    beyond: int = 0
    """How many values lie beyond the range; the end bins hold them."""
    max_amax: float = math.inf
    """The cap on the range."""


def search_thresholds(
    amax: Mapping[str, float],
    histograms: Mapping[str, klquant.Histogram],
    *,
    criterion: Criterion = "entropy",
    options: Mapping[str, LayerOptions] | None = None,
    hidden: Mapping[str, Hidden] | None = None,
) -> dict[str, LayerThreshold]:
    """Choose the clipping threshold of every observed tensor.

    Parameters
    ----------
    amax, histograms : mapping
        By qualified layer name. The search ignores the centre bin, which holds the zeros. The histograms are not
        changed.
    criterion : {"entropy", "max", "percentile", "mse"}
        Minimise the KL divergence, take amax, take the 99.99th percentile of the non-zero values, or minimise the
        expected squared error.
    options : mapping, optional
        Options of single layers, by qualified name.
    hidden : mapping, optional
        What the histograms do not show, by qualified name; see :class:`Hidden`.

    Returns
    -------
    dict
        A LayerThreshold by qualified layer name.

    Raises
    ------
    InvalidInputError
        For an unknown criterion, a layer without a histogram, more levels than bins; naming the layer.

    Warns
    -----
    CalibrationWarning
        Naming the layer, for a tensor that is always 0 (it gets scale 1), for one without a feasible threshold (it
        gets T = amax), and where T clips so hard that another criterion should be tried.
    """
    check_criterion(criterion)
    general = LayerOptions(criterion).over(_GENERAL)
    found, complaints = {}, dict[str, Complaint]()
    for name, largest in amax.items():
        chosen = (options or {}).get(name, LayerOptions()).over(general)
        unseen = (hidden or {}).get(name, Hidden())
        found[name], complaint = _search(name, largest, histograms.get(name), chosen, unseen)
        if complaint.text:
            complaints[name] = complaint
    _warn(complaints, len(found))
    return found


def _warn(complaints: Mapping[str, Complaint], number: int) -> None:
    """Warn of each layer; of more than three with one warning, which names the worst three and what to pass."""
    if len(complaints) <= SHOWN:
        for name, complaint in complaints.items():
            warn(f"layer `{name}`: {complaint.text}", {name: complaint.better} if complaint.better else {})
        return
    worst = sorted(complaints, key=lambda name: complaints[name].loss_db, reverse=True)[:SHOWN]
    listed = "; ".join(f"`{name}`: {complaints[name].text}" for name in worst)
    better = {name: complaint.better for name, complaint in complaints.items() if complaint.better}
    warn(f"{len(complaints)} of {number} layers need a look, the worst are {listed}", better)


def check_criterion(criterion: str) -> None:
    """Raise InvalidInputError for an unknown criterion."""
    if criterion not in CRITERIA:
        raise InvalidInputError(f"`criterion` must be one of {', '.join(CRITERIA)}, got {criterion!r}")


def candidate_thresholds(
    amax: Mapping[str, float],
    histograms: Mapping[str, klquant.Histogram],
    options: Mapping[str, LayerOptions],
    hidden: Mapping[str, Hidden] | None = None,
) -> dict[str, dict[str, LayerThreshold]]:
    """Return the thresholds by criterion and layer, without warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        return {
            name: search_thresholds(amax, histograms, criterion=name, options=options, hidden=hidden)
            for name in CRITERIA
        }


def _search(
    name: str, amax: float, histogram: klquant.Histogram | None, options: LayerOptions, hidden: Hidden
) -> tuple[LayerThreshold, Complaint]:
    """Return the threshold of one layer, and what the user should know about it."""
    bits = int(options.num_bits or 8)
    if amax == 0:
        one = float(2 ** (bits - 1) - 1)
        layer = LayerThreshold(0.0, one, math.nan, 0.0, math.inf, "none", bits)
        return layer, Complaint("all its values are 0; it gets scale 1")
    if histogram is None:
        raise InvalidInputError(f"layer `{name}` has an amax but no histogram; collect both from the same data")
    seen = _Seen.of(amax, histogram, hidden)
    try:
        layer = _layer_threshold(_evaluate(seen, options), seen, options, bits)
        clips = _overclipped(layer, seen)
        return layer, clips._replace(text="; ".join(filter(None, [seen.complaint(), clips.text])))
    except InfeasibleError:
        layer = LayerThreshold(amax, amax, math.nan, 0.0, math.nan, "none", bits)
        complaint = f"no threshold is feasible; it gets T = amax = {amax}"
        return layer, Complaint("; ".join(filter(None, [seen.complaint(), complaint])), loss_db=math.inf)
    except KLQuantError as error:
        raise type(error)(f"layer `{name}`: {error}") from error


class _Seen(NamedTuple):
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
    def of(cls, amax: float, histogram: klquant.Histogram, hidden: Hidden) -> "_Seen":
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


def _evaluate(seen: _Seen, options: LayerOptions) -> klquant.Threshold:
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


def _layer_threshold(found: klquant.Threshold, seen: _Seen, options: LayerOptions, bits: int) -> LayerThreshold:
    """Return the result of a search in the non-zero bins as one for all values."""
    criterion = str(options.criterion) if options.threshold is None else "fixed"
    value = seen.top if criterion == "max" else float(found.value)
    clipped = float(found.clipped) * seen.hist.sum().item() / seen.total
    if value < seen.amax:
        clipped = max(clipped, seen.hidden.beyond / seen.total)
    sqnr_db = seen.sqnr_db(found, 2**bits - 1)
    return LayerThreshold(seen.amax, value, float(found.divergence), clipped, sqnr_db, criterion, bits)


def _overclipped(layer: LayerThreshold, seen: _Seen) -> Complaint:
    """Return a complaint where another criterion would clip less and keep more."""
    if layer.criterion not in ("entropy", "percentile"):
        return Complaint()
    levels = 2**layer.num_bits - 1
    others: list[Criterion] = ["max"] if len(seen.hist) * 2**layer.num_bits > MAX_MSE else ["mse", "max"]
    found = {name: _evaluate(seen, LayerOptions(name, layer.num_bits)) for name in others}
    alternatives: dict[str, float] = {name: seen.sqnr_db(one, levels) for name, one in found.items()}
    numbers = {"threshold": layer.threshold, "clipped": layer.clipped, "sqnr_db": layer.sqnr_db}
    text = overclipped(amax=seen.top, alternatives=alternatives, **numbers)
    best = max(alternatives, key=lambda name: alternatives[name])
    loss_db = alternatives[best] - layer.sqnr_db
    return Complaint(text, best if text and loss_db > 0 else "", loss_db if loss_db > 0 else 0.0)
