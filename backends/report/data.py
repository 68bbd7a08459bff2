"""The content of a report as plain data, for the page and as JSON."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

import klquant

from ..calibration import Calibration, Fingerprint, checked
from ..observed import Seen
from ..settings import LayerOptions
from ..text import ratio, without_nan
from ..thresholds import LayerThreshold, candidate_thresholds, complaint_about
from .charts import Bars, Curve, sum_bars, thin_curve
from .diagnosis import Diagnosed, Weights, check_diagnosis, describe_weights


class Choice(NamedTuple):
    """One threshold of a tensor and its effect."""

    criterion: str
    threshold: float
    ratio: float
    """T / amax."""
    clipped: float
    """Share of all values beyond T."""
    sqnr_db: float
    """Expected from the histogram."""
    divergence: float
    """In nats; NaN for other criteria than entropy."""


class Tensor(NamedTuple):
    """All about one observed tensor."""

    name: str
    amax: float
    chosen: Choice
    """The threshold in the calibration."""
    guard: str
    """What the guard changed, as ``entropy -> mse: 13.2 dB``; empty if nothing."""
    criteria: dict[str, Choice]
    """What each criterion chooses at this number of bits, without criteria that find no threshold."""
    measured_sqnr_db: float
    """From a diagnosis; NaN without one."""
    num_bits: int
    calls: int
    """How often one batch passes it."""
    num_values: int
    num_zeros: int
    """Number of values in the centre bin, which the search leaves out."""
    warnings: list[str]
    better: str
    """A criterion that expects less error; empty without a warning about it."""
    bars: Bars | None
    """None for a tensor that is always 0."""
    curve: Curve | None


class Report(NamedTuple):
    """The content of the page. It has no date, so that the same calibration always gives the same bytes."""

    title: str
    verdict: str
    """One sentence about the quantized model; empty if nobody measured it."""
    ways: list[Mapping[str, str]]
    """How the model was quantized and what that achieved, one row of a table each."""
    next_steps: list[str]
    versions: dict[str, str]
    """Of the libraries that made the calibration."""
    settings: dict[str, Any]
    model: dict[str, Fingerprint]
    num_batches: int
    tensors: list[Tensor]
    weights: list[Weights] | None
    """None if no scales are known."""
    diagnosis: dict[str, Any] | None
    """The content of ``Diagnosis.as_json``; None without a diagnosis."""
    transforms: dict[str, list[dict[str, Any]]]
    skipped: dict[str, str]

    @property
    def worst(self) -> Tensor | None:
        """Return the tensor with the least SQNR; None if no SQNR is known."""
        known = [one for one in self.tensors if not math.isnan(sqnr_of(one))]
        return min(known, key=sqnr_of, default=None)

    @property
    def better(self) -> dict[str, str]:
        """Return the criteria that expect less error, by tensor."""
        return {one.name: one.better for one in self.tensors if one.better}

    def as_json(self) -> str:
        """Return the content as JSON, with null for NaN and infinity."""
        return json.dumps(without_nan(self), separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sqnr_of(tensor: Tensor) -> float:
    """Return the SQNR of a tensor: measured or expected from its histogram, whichever is less; NaN if unknown."""
    known = (one for one in (tensor.chosen.sqnr_db, tensor.measured_sqnr_db) if not math.isnan(one))
    return min(known, default=math.nan)


def describe(
    calibration: Calibration,
    *,
    title: str = "Calibration report",
    diagnosis: Diagnosed | None = None,
    weight_scales: Mapping[str, Any] | None = None,
    verdict: str = "",
    ways: Iterable[Mapping[str, str]] = (),
    next_steps: Iterable[str] = (),
    progress: bool = True,
) -> Report:
    """Collect the content of a report about a calibration.

    Parameters
    ----------
    calibration : Calibration
        Of any backend. Missing thresholds are searched by entropy.
    title : str
    diagnosis : Diagnosis or mapping, optional
        A diagnosis or its parsed JSON. It adds measured SQNR and a ranking of layers by sensitivity.
    weight_scales : mapping, optional
        Scales of the output channels by layer, instead of those in the calibration; 0 marks a dead channel.
    verdict : str
        One sentence about the quantized model, which the page begins with.
    ways : iterable of mapping
        A table of how the model was quantized, one mapping of texts by column for each row.
    next_steps : iterable of str
        What to do next: commands or sentences.
    progress : bool
        Show a progress bar on a terminal or in a notebook.

    Returns
    -------
    Report

    Raises
    ------
    InvalidInputError
        If `calibration` is not a Calibration, the diagnosis is malformed or of other layers, or scales are not finite
        numbers from 0. The message names the layer.

    Notes
    -----
    Cost: a search by every criterion for every tensor, about 10 ms each at 4001 bins.
    """
    names: Iterable[str] = checked(calibration).amax
    if progress:
        from ..batches import tracked

        names = tracked(list(names), "report")
    found = None if diagnosis is None else check_diagnosis(diagnosis, calibration.amax)
    measured = {layer["name"]: layer["activation_sqnr_db"] for layer in (found or {"layers": []})["layers"]}
    scales = calibration.weight_scales if weight_scales is None else weight_scales
    calibration = _searched(calibration)
    return Report(
        title=title,
        verdict=verdict,
        ways=[dict(way) for way in ways],
        next_steps=list(next_steps),
        versions=dict(calibration.versions) or {"klquant": klquant.__version__, "numpy": np.__version__},
        settings=calibration.settings.as_json(),
        model=calibration.model,
        num_batches=calibration.num_batches,
        tensors=[_describe_tensor(calibration, name, measured) for name in names],
        weights=describe_weights(scales, calibration) if scales else None,
        diagnosis=found,
        transforms=calibration.transforms,
        skipped=calibration.skipped,
    )


def _searched(calibration: Calibration) -> Calibration:
    """Return the calibration with a threshold for every tensor."""
    missing = {name: amax for name, amax in calibration.amax.items() if name not in calibration.thresholds}
    found = calibration._replace(amax=missing).search_thresholds()
    return calibration._replace(thresholds={**found, **calibration.thresholds})


def _describe_tensor(calibration: Calibration, name: str, measured: Mapping[str, float | None]) -> Tensor:
    found, histogram = calibration.thresholds[name], calibration.histograms.get(name)
    criteria, curve = dict[str, LayerThreshold](), None
    seen = histogram and Seen.of(calibration.amax[name], histogram, calibration.hidden[name])
    if histogram is not None and 2**found.num_bits - 1 <= len(histogram.hist):
        criteria = _try_criteria(calibration, name, found.num_bits)
        curve = thin_curve(histogram, num_quantized_bins=2**found.num_bits - 1)
    sqnr_db, complaint = measured.get(name), complaint_about(found, seen, criteria)
    return Tensor(
        name,
        found.amax,
        _choice(found),
        found.how if found.replaced else "",
        {criterion: _choice(one) for criterion, one in criteria.items()},
        math.nan if sqnr_db is None else sqnr_db,
        found.num_bits,
        calibration.calls.get(name, 1),
        0 if histogram is None else int(histogram.hist.sum()),
        0 if histogram is None else int(histogram.hist[len(histogram.hist) // 2]),
        [complaint.text] if complaint.text else [],
        complaint.better,
        None if histogram is None else sum_bars(histogram),
        curve,
    )


def _try_criteria(calibration: Calibration, name: str, num_bits: int) -> dict[str, LayerThreshold]:
    """Return what each criterion finds, whatever criterion the settings ask for."""
    options = calibration.settings.resolve([name]).get(name, LayerOptions())
    free = {name: options._replace(criterion=None, threshold=None, num_bits=num_bits)}
    amax, histograms = {name: calibration.amax[name]}, {name: calibration.histograms[name]}
    candidates = candidate_thresholds(amax, histograms, free, calibration.hidden)
    return {
        criterion: by_name[name] for criterion, by_name in candidates.items() if by_name[name].criterion == criterion
    }


def _choice(found: LayerThreshold) -> Choice:
    return Choice(found.criterion, found.threshold, ratio(found), found.clipped, found.sqnr_db, found.divergence)
