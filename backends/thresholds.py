"""From histograms to one threshold for every layer."""

import logging
import math
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import klquant
from klquant.errors import CalibrationWarning, InfeasibleError, InvalidInputError, KLQuantError

from .guard import Complaint, overclipped
from .observed import MAX_MSE, Hidden, Seen, evaluate
from .settings import CRITERIA, Criterion, LayerOptions, check_choice
from .warning import warn

logger = logging.getLogger("klquant")
ALTERNATIVES: tuple[Criterion, ...] = ("mse", "max")  # what the guard may take
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
    replaced: str = ""
    """The criterion that was asked for, where the guard took another one."""
    gain_db: float = 0.0
    """How much more SQNR is expected than with the criterion that was replaced."""
    guarded: bool = False
    """Whether the guard watches over T. A grid with a zero point may then get another T."""

    def __repr__(self) -> str:
        """Return the threshold in one line."""
        numbers = f"threshold={self.threshold:.6g}, amax={self.amax:.6g}, criterion={self.how!r}"
        return f"LayerThreshold({numbers}, clipped={self.clipped:.4%}, sqnr_db={self.sqnr_db:.1f})"

    @property
    def scale(self) -> float:
        """Return the step between two levels, T / 127 for INT8."""
        return self.threshold / float(2 ** (self.num_bits - 1) - 1)

    @property
    def how(self) -> str:
        """Return the criterion, as ``entropy -> mse: 13.2 dB`` where the guard took another one."""
        return f"{self.replaced} -> {self.criterion}: {self.gain_db:.1f} dB" if self.replaced else self.criterion


def search_thresholds(
    amax: Mapping[str, float],
    histograms: Mapping[str, klquant.Histogram],
    *,
    criterion: Criterion = "entropy",
    options: Mapping[str, LayerOptions] | None = None,
    hidden: Mapping[str, Hidden] | None = None,
    guard: bool = True,
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
    guard : bool
        Take the better one of mse and max where the entropy criterion clips too much: if ``T < amax / 2`` clips more
        than 0.1 % of the values, if any T clips most of them, or if the expected SQNR is more than 3 dB lower. The
        result records it: `replaced` and `gain_db`. Layers whose own options name a criterion keep it. False is the
        literal algorithm, with a warning instead.

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
        gets T = amax), for one with outliers, and where T clips so hard that another criterion should be tried.
    """
    check_choice("criterion", criterion, CRITERIA, "criteria")
    general = LayerOptions(criterion).over(_GENERAL)
    found, complaints = {}, dict[str, Complaint]()
    for name, largest in amax.items():
        own = (options or {}).get(name, LayerOptions())
        unseen = (hidden or {}).get(name, Hidden())
        guarded = guard and criterion == "entropy" and own.criterion is None
        layer, complaint = _search(name, largest, histograms.get(name), own.over(general), unseen, guarded)
        found[name] = layer._replace(guarded=guarded)
        if complaint.text:
            complaints[name] = complaint
    _log(found)
    _warn(complaints, len(found))
    return found


def _log(found: Mapping[str, LayerThreshold]) -> None:
    """Log how many tensors the guard changed, and which one gains most."""
    changed = {name: layer.gain_db for name, layer in found.items() if layer.replaced}
    if changed:
        worst = max(changed, key=changed.__getitem__)
        logger.info("guard: %d of %d tensors changed, most `%s`: %s", len(changed), len(found), worst, found[worst].how)


def _warn(complaints: Mapping[str, Complaint], number: int) -> None:
    """Warn of each layer; of more than three with one warning, which names the worst three and what to pass."""
    if len(complaints) <= SHOWN:
        for name, complaint in complaints.items():
            warn(f"layer `{name}`: {complaint.text}", {name: complaint.better} if complaint.better else {})
        return
    worst = sorted(complaints, key=lambda name: complaints[name].gain_db, reverse=True)[:SHOWN]
    listed = "; ".join(f"`{name}`: {complaints[name].text.partition('; ')[0]}" for name in worst)
    better = {name: complaint.better for name, complaint in complaints.items() if complaint.better}
    warn(f"{len(complaints)} of {number} layers need attention; the worst: {listed}", better)


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
            name: search_thresholds(amax, histograms, criterion=name, options=options, hidden=hidden, guard=False)
            for name in CRITERIA
        }


def complaint_about(layer: LayerThreshold, seen: Seen | None, alternatives: Mapping[str, LayerThreshold]) -> Complaint:
    """Return what the user should know about a threshold.

    `seen` is None without a histogram. Without alternatives only the range of the values is judged.
    """
    if layer.amax == 0:
        return Complaint("all its values are 0; it gets scale 1", gain_db=-math.inf)
    if seen is None:
        return Complaint()
    if layer.criterion == "none":
        infeasible = f"no threshold is feasible; it gets T = amax = {layer.amax}"
        return Complaint(infeasible, gain_db=math.inf).after(seen.complaint())
    if layer.criterion in ("max", "mse") or not alternatives:
        return Complaint(seen.complaint())
    decibels: dict[str, float] = {k: alternatives[k].sqnr_db for k in ALTERNATIVES if k in alternatives}
    numbers = {"threshold": layer.threshold, "clipped": layer.clipped, "sqnr_db": layer.sqnr_db}
    return overclipped(amax=seen.top, alternatives=decibels, **numbers).after(seen.complaint())


def _search(
    name: str,
    amax: float,
    histogram: klquant.Histogram | None,
    options: LayerOptions,
    hidden: Hidden,
    guarded: bool,
) -> tuple[LayerThreshold, Complaint]:
    """Return the threshold of one layer, and what the user should know about it."""
    bits = int(options.num_bits or 8)
    if amax == 0:
        one = float(2 ** (bits - 1) - 1)
        layer = LayerThreshold(0.0, one, math.nan, 0.0, math.inf, "none", bits)
        return layer, complaint_about(layer, None, {})
    if histogram is None:
        raise InvalidInputError(f"layer `{name}` has an amax but no histogram; collect both from the same data")
    seen = Seen.of(amax, histogram, hidden)
    try:
        layer, alternatives = _layer_threshold(seen, options), _alternatives(seen, options)
    except InfeasibleError:
        layer, alternatives = LayerThreshold(amax, amax, math.nan, 0.0, math.nan, "none", bits), {}
    except KLQuantError as error:
        raise type(error)(f"layer `{name}`: {error}") from error
    complaint = complaint_about(layer, seen, alternatives)
    if guarded and complaint.better:
        layer = alternatives[complaint.better]._replace(replaced=layer.criterion, gain_db=complaint.gain_db)
        complaint = complaint_about(layer, seen, {})
    return layer, complaint


def _layer_threshold(seen: Seen, options: LayerOptions) -> LayerThreshold:
    """Return the result of a search in the non-zero bins as one for all values."""
    found, bits = evaluate(seen, options), int(options.num_bits or 8)
    criterion = str(options.criterion) if options.threshold is None else "fixed"
    value = seen.top if criterion == "max" else float(found.value)
    clipped = float(found.clipped) * seen.hist.sum().item() / seen.total
    if value < seen.amax:
        clipped = max(clipped, seen.hidden.beyond / seen.total)
    sqnr_db = seen.sqnr_db(found, 2**bits - 1)
    return LayerThreshold(seen.amax, value, float(found.divergence), clipped, sqnr_db, criterion, bits)


def _alternatives(seen: Seen, options: LayerOptions) -> dict[str, LayerThreshold]:
    """Return what other criteria find, where that matters: for entropy and percentile."""
    if options.threshold is not None or options.criterion not in ("entropy", "percentile"):
        return {}
    bits = int(options.num_bits or 8)
    others = ALTERNATIVES[1:] if len(seen.hist) * 2**bits > MAX_MSE else ALTERNATIVES
    return {name: _layer_threshold(seen, LayerOptions(name, bits)) for name in others}
