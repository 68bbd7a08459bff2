"""Quantize a function: the same jaxpr, with products of integers."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack, get_args

import jax
import numpy as np

from klquant.errors import InvalidInputError

from ..calibration import Calibration, checked
from ..collection.distributed import Group
from ..settings import EXCLUDED, Criterion, CriterionOrAuto, Settings, SettingsOptions, matching
from ..thresholds import LayerThreshold
from ..warning import warn_of_floats
from .calibration import calibrate, look_ahead, traced
from .description import Description
from .kernels import (
    INT8_BITS,
    Form,
    Levels,
    arranged,
    multiply,
    multiply_simulated,
    qmax,
    quantize_activation,
    rounded_operands,
    terms,
)
from .model.arguments import Function, Static, on_arrays
from .model.interpretation import Rule, interpret
from .model.sites import Site
from .model.tracing import trace
from .quantized_function import QuantizedFunction

MAX_SUM = 2**31 - 1


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
    first, batches = look_ahead(batches)
    calibration = calibrate(f, params, batches, **options)
    if first is None:
        raise InvalidInputError("every process needs at least one batch, got none; use calibrate and requantize")
    return requantize(f, params, first, calibration, form=form, straight_through=straight_through)


def requantize(
    f: Function,
    params: Any,
    batch: Any,
    calibration: Calibration,
    *,
    form: Form = "int8",
    straight_through: bool = False,
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
    form, straight_through
        As for :func:`quantize`.
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
    check_form(form, straight_through)
    description = traced(f, params, batch)
    checked(calibration).check_fits(description.fingerprint)
    exclude = search.get("exclude", ())
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    found = _searched(calibration, search.get("criterion"), search.get("num_bits"), search.get("guard"))
    Settings.make(exclude=patterns).check_patterns(found.thresholds)
    excluded = matching(found.thresholds, patterns)
    chosen = {name: layer for name, layer in found.thresholds.items() if name not in excluded}
    reasons = {**found.skipped, **dict.fromkeys(excluded, EXCLUDED)}
    thresholds, skipped = _feasible(description, chosen, reasons, form)
    weights = description.quantized_weights(found.settings.resolve(thresholds), found.settings.dead_channel)
    fixed = {} if straight_through else weights
    if form == "int8":
        sites = description.program.named
        fixed = {name: w._replace(levels=arranged(sites[name], 1, w.levels)) for name, w in weights.items()}
    function = _function(f, found._replace(thresholds=thresholds), fixed, form)
    scales = {name: np.asarray(weight.scale).ravel() for name, weight in weights.items()}
    saved = description.num_bytes(weights) - sum(
        weight.levels.nbytes + weight.scale.nbytes for weight in weights.values()
    )
    warn_of_floats("layer", {name: reason for name, reason in skipped.items() if reason != EXCLUDED})
    return QuantizedFunction(function, form, thresholds, scales, skipped, found, saved)


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
    if form == "simulate":
        return ""
    bits = max(layer.num_bits for layer in thresholds.values())
    if bits > INT8_BITS:
        return f"{bits} bits do not fit INT8"
    if terms(site) * qmax(bits) ** 2 > MAX_SUM:
        return f"a sum of {terms(site)} products may exceed INT32"
    return ""


def _function(f: Function, found: Calibration, fixed: Mapping[str, Levels], form: Form) -> Callable[..., Any]:
    """Return the quantized function; it is traced for the shapes of each call. `fixed` are its weights."""
    multiplied = functools.partial(_product, found.thresholds, form, found.settings.dead_channel)

    def run(static: tuple[Static, Static], params: Sequence[Any], inputs: Sequence[Any]) -> Any:
        program = trace(f, static, params, inputs)
        sites = {
            path: site for path, site in program.sites.items() if found.thresholds.keys() >= {*site.tensors.values()}
        }
        given = {path: fixed[site.name] for path, site in sites.items() if site.name in fixed}
        rule = Rule(lambda site, operands, weight, state: (multiplied(site, operands, weight), state), sites, given)
        return jax.tree.unflatten(program.result, interpret(program.jaxpr, [*params, *inputs], rule, {})[0])

    return on_arrays(run, f)


def _product(
    thresholds: Mapping[str, LayerThreshold],
    form: Form,
    dead_channel: float,
    site: Site,
    operands: Sequence[Any],
    weight: Levels | None,
) -> Any:
    """Return the product at a site. In a simulation without a weight in integers, it is rounded here."""
    if form == "simulate":
        values = rounded_operands(site, operands, thresholds, dead_channel)
        if site.weight is not None and weight is not None:
            values[site.weight] = weight.values
        return multiply_simulated(site, values)
    layers = {k: thresholds[name] for k, name in site.tensors.items()}
    levels = [
        quantize_activation(arranged(site, k, x), layers[k].scale, layers[k].num_bits) if k in layers else weight
        for k, x in enumerate(operands)
    ]
    return multiply(site, [one for one in levels if one is not None])
