"""Quantize a function: the same jaxpr, with products of integers."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack, get_args

import numpy as np

from klquant.errors import InvalidInputError

from ..batches import check_repeatable
from ..calibration import Calibration, checked
from ..collection.distributed import Group
from ..ranges import Range
from ..settings import EXCLUDED, Criterion, CriterionOrAuto, Settings, SettingsOptions, matching
from ..thresholds import LayerThreshold
from ..warning import warn_of_floats
from .calibration import calibrate, look_ahead, traced
from .correction import mean_shifts
from .description import Description
from .grids import INT8_BITS, MAX_SUM, Grid, asymmetric_ranges, make_grids
from .kernels import TINY, Form, Levels, arranged, level_sums
from .model.arguments import Function
from .model.sites import Site, terms
from .model.tracing import check_names
from .quantized_function import QuantizedFunction
from .substitution import Substitution, substituted


class CalibrationOptions(SettingsOptions, total=False):
    """The keyword arguments of :func:`calibrate`."""

    criterion: CriterionOrAuto
    progress: bool
    process_group: Group
    resume: str | Path | None
    checkpoint_seconds: float


class SearchOptions(TypedDict, total=False):
    """How thresholds are chosen from a calibration, and for what."""

    criterion: Criterion | None
    num_bits: int | None
    guard: bool | None
    exclude: Iterable[str] | str


def quantize(
    f: Function,
    params: Any,
    batches: Iterable[Any],
    *,
    form: Form = "int8",
    straight_through: bool = False,
    zero_points: bool = False,
    correct_bias: bool = False,
    **options: Unpack[CalibrationOptions],
) -> QuantizedFunction:
    """Calibrate a function on data and return it with its products in INT8.

    Parameters
    ----------
    f : callable (params, *inputs)
        Any function that JAX can trace, in floating point.
    params : pytree
        Its parameters.
    batches : iterable
        Calibration data, as for :func:`calibrate`; every process needs some.
    form : {"int8", "simulate"}
        "int8" multiplies INT8 operands with INT32 sums. "simulate" computes the same in floating point.
    straight_through : bool
        With "simulate": let gradients pass the rounding, and round the weights anew from the parameters of each call,
        to train through quantization.
    zero_points : bool
        Round activations that are spread unevenly about 0, such as those behind a ReLU, to 256 levels over the range
        that has values, with a zero point, where that has less expected error.
    correct_bias : bool
        Add to the result of each product with a weight what rounding takes from the mean of each output channel. This
        takes one more pass over the data.
    **options
        As for :func:`calibrate`: ``criterion``, ``progress``, ``process_group``, ``resume``, ``checkpoint_seconds`` and
        the settings.

    Returns
    -------
    QuantizedFunction
        Its `function` has the signature of `f`. The quantized weights are those of `params` here, rounded once, per
        output channel; everything else, such as biases, comes from the parameters that are passed to it.

    Raises
    ------
    InvalidInputError, ModelError
        As for :func:`calibrate`; for an unknown form, and `straight_through` without "simulate".

    Warns
    -----
    CalibrationWarning
        For products that stay in floating point although they are not excluded, and as :func:`calibrate` does.
    """
    check_form(form, straight_through)
    if correct_bias:
        check_repeatable(batches, "pass a list or a DataLoader, or correct_bias=False")
    first, batches = look_ahead(batches)
    calibration = calibrate(f, params, batches, **options)
    if first is None:
        raise InvalidInputError("every process needs at least one batch, got none; use calibrate and requantize")
    progress, group = options.get("progress", True), options.get("process_group")
    way = _Way(form, straight_through, zero_points, batches if correct_bias else None, progress, group)
    return _requantized(f, params, first, calibration, way, {})


def requantize(
    f: Function,
    params: Any,
    batch: Any,
    calibration: Calibration,
    *,
    form: Form = "int8",
    straight_through: bool = False,
    zero_points: bool = False,
    correction_batches: Iterable[Any] | None = None,
    **search: Unpack[SearchOptions],
) -> QuantizedFunction:
    """Quantize a function by its calibration, without data.

    Parameters
    ----------
    f, params
        The function that was calibrated, with the same weights.
    batch
        Inputs as in the calibration data; only shapes matter, so ``jax.ShapeDtypeStruct`` will do.
    calibration : Calibration
        Of :func:`calibrate`, or from ``Calibration.load(path)``.
    form, straight_through, zero_points
        As for :func:`quantize`.
    correction_batches : iterable, optional
        Data to correct biases with, as `correct_bias` of :func:`quantize` does.
    **search
        ``criterion`` ("entropy", "max", "percentile" or "mse"), ``num_bits`` and ``guard``: how T is chosen anew; by
        default the thresholds of the calibration stay. ``exclude``: patterns of names that stay in floating point.

    Returns
    -------
    QuantizedFunction

    Raises
    ------
    InvalidInputError
        If the calibration is of another function or other weights, naming the layers that differ.

    Warns
    -----
    CalibrationWarning
        As for :func:`quantize`.
    """
    way = _Way(form, straight_through, zero_points, correction_batches)
    return _requantized(f, params, batch, calibration, way, search)


class _Way(NamedTuple):
    """How to quantize with a calibration."""

    form: Form
    straight_through: bool
    zero_points: bool
    correction: Iterable[Any] | None
    """Data to correct biases with."""
    progress: bool = True
    group: Group = None


def _requantized(
    f: Function, params: Any, batch: Any, calibration: Calibration, way: _Way, search: SearchOptions
) -> QuantizedFunction:
    check_form(way.form, way.straight_through)
    description = traced(f, params, batch)
    checked(calibration).check_fits(description.fingerprint)
    check_names({*calibration.amax, *calibration.skipped}, description.program)
    exclude = search.get("exclude", ())
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    found = _searched(calibration, search.get("criterion"), search.get("num_bits"), search.get("guard"))
    Settings.make(exclude=patterns).check_patterns(found.thresholds)
    excluded = matching(found.thresholds, patterns)
    chosen = {name: layer for name, layer in found.thresholds.items() if name not in excluded}
    reasons = {**found.skipped, **dict.fromkeys(excluded, EXCLUDED)}
    thresholds, skipped = _feasible(description, chosen, reasons, way.form)
    kept, ranges = found._replace(thresholds=thresholds), dict[str, Range]()
    if way.zero_points:
        thresholds, ranges = asymmetric_ranges(kept, _with_zero_points(description))
    grids = make_grids(thresholds, ranges)
    weights = description.quantized_weights(found.settings.resolve(thresholds), found.settings.dead_channel)
    shifts = _shifts(f, params, way, grids, description, found.settings.dead_channel)
    used = _used_weights(description, weights, grids, way)
    chosen_way = Substitution(way.form, description.program.products, grids, used, shifts, found.settings.dead_channel)
    function = substituted(f, chosen_way)
    scales = {name: np.asarray(weight.scale).ravel() for name, weight in weights.items()}
    saved = description.num_bytes(weights) - sum(
        weight.levels.nbytes + weight.scale.nbytes for weight in weights.values()
    )
    warn_of_floats("layer", {name: reason for name, reason in skipped.items() if reason != EXCLUDED})
    corrections = {name: float(np.abs(shift).max()) for name, shift in shifts.items()}
    return QuantizedFunction(function, way.form, thresholds, scales, skipped, found, saved, ranges, corrections)


def _with_zero_points(description: Description) -> dict[str, Site]:
    """Return the products by the name of each operand that may have a zero point; a kernel that is computed may not."""
    return {
        name: site
        for site in description.program.sites.values()
        for k, name in site.tensors.items()
        if k == 0 or site.primitive == "dot_general"
    }


def _shifts(
    f: Function, params: Any, way: _Way, grids: Mapping[str, Grid], description: Description, dead_channel: float
) -> dict[str, Any]:
    """Return what bias correction adds to the result of each product that has a weight."""
    if way.correction is None:
        return {}
    lengths = {
        site.name: description.weights[path].shape[: len(site.varies)]
        for path, site in description.program.sites.items()
        if path in description.weights and grids.keys() >= {*site.tensors.values()}
    }
    options: dict[str, Any] = {"dead_channel": dead_channel, "progress": way.progress, "group": way.group}
    products = description.program.products
    return dict(mean_shifts(f, params, way.correction, grids, lengths, products=products, **options))


def _used_weights(
    description: Description, weights: Mapping[str, Levels], grids: Mapping[str, Grid], way: _Way
) -> Mapping[str, Levels]:
    """Return the weights as the function needs them: none if it rounds them anew, else in order for its products."""
    if way.form == "simulate":
        return {} if way.straight_through else weights
    found, sites = dict[str, Levels](), description.program.named
    for name, weight in weights.items():
        site = sites[name]
        operand = site.weight or 0
        found[name] = weight._replace(levels=arranged(site, operand, weight.levels))
        if any(grids[one].zero_point for one in site.tensors.values()):
            found[name] = found[name]._replace(sums=level_sums(site, operand, found[name]))
    return found


def check_form(form: str, straight_through: bool) -> None:
    """Raise InvalidInputError for an unknown form, or gradients where there are none."""
    if form not in get_args(Form):
        raise InvalidInputError(f"`form` must be one of {', '.join(get_args(Form))}, got {form!r}")
    if straight_through and form != "simulate":
        raise InvalidInputError(f"`straight_through` needs form='simulate', got {form!r}: integers have no gradient")


def _searched(
    calibration: Calibration, criterion: Criterion | None, num_bits: int | None, guard: bool | None
) -> Calibration:
    """Return the calibration with the thresholds that are asked for."""
    settings = calibration.settings.with_bits(num_bits)
    guarded = any(layer.replaced for layer in calibration.thresholds.values())
    if criterion is None and num_bits is None and calibration.thresholds and not (guarded and guard is False):
        return calibration
    thresholds = calibration.search_thresholds(criterion=criterion or "entropy", num_bits=num_bits, guard=guard)
    return calibration._replace(settings=settings, thresholds=thresholds)


def _feasible(
    description: Description, thresholds: Mapping[str, LayerThreshold], skipped: Mapping[str, str], form: Form
) -> tuple[dict[str, LayerThreshold], dict[str, str]]:
    """Return the thresholds of products that this form can compute, and why the others stay in floating point."""
    kept, reasons = dict[str, LayerThreshold](), dict(skipped)
    for site in description.program.sites.values():
        names = list(site.tensors.values())
        found = {name: thresholds[name] for name in names if name in thresholds}
        reason = (
            "its other operand stays in floating point" if len(found) < len(names) else _obstacle(site, found, form)
        )
        if reason:
            reasons.update(dict.fromkeys(found, reason))
        else:
            kept.update(found)
    return kept, reasons


def _obstacle(site: Site, thresholds: Mapping[str, LayerThreshold], form: Form) -> str:
    """Return why a product cannot be computed in INT8; empty if it can."""
    if min(layer.scale for layer in thresholds.values()) < TINY:
        return f"a scale is less than the smallest normal number of float32, {TINY:.1e}"
    if form == "simulate":
        return ""
    bits = max(layer.num_bits for layer in thresholds.values())
    if bits > INT8_BITS:
        return f"{bits} bits do not fit INT8"
    if terms(site) * Grid(1.0, bits).span ** 2 > MAX_SUM:
        return f"a sum of {terms(site)} products may exceed INT32"
    return ""
