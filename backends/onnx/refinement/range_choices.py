"""Other ranges of activations than a calibration has: those that clip nothing, and those of channels made alike."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from ...calibration import Calibration
from ...settings import Engine
from ...thresholds import LayerThreshold
from ..calibration import calibrate
from ..execution import Feed
from ..model.normal_form import keep_body_inputs
from ..model.observed import observed_tensors
from ..model.preparation import Prepared, prepare
from ..placement import Ranges, find_ranges
from ..scaling.convolutions import find_convolutions
from ..scaling.smooth_quant import smoothed


class Base(NamedTuple):
    """A float model and the ranges that its activations may get."""

    prepared: Prepared
    choices: list[Ranges]
    """As calibrated, and those that clip nothing."""
    scaled: Mapping[str, str] = {}
    """Of each tensor whose channels are scaled, the name in the model as given."""
    convolutions: bool = False
    """Whether tensors between convolutions are among them."""


def given_base(
    prepared: Prepared, ranges: Ranges, calibration: Calibration | Mapping[str, float], engine: Engine
) -> Base:
    """Return a model as it is; only a Calibration knows how wide a range may become."""
    if not isinstance(calibration, Calibration):
        return Base(prepared, [ranges])
    return Base(prepared, [ranges, _wide(prepared, calibration, engine, asymmetric=bool(ranges.candidates))])


def _wide(prepared: Prepared, calibration: Calibration, engine: Engine, *, asymmetric: bool) -> Ranges:
    """Return ranges that clip nothing of the calibration data, where the guard watches over them."""
    thresholds = {
        name: LayerThreshold(layer.amax, layer.amax, math.nan, 0.0, criterion="max")
        if layer.guarded and layer.amax > 0
        else layer
        for name, layer in calibration.thresholds.items()
    }
    return find_ranges(prepared, calibration._replace(thresholds=thresholds), engine, asymmetric=asymmetric)


def smoothed_bases(
    prepared: Prepared,
    calibration: Calibration | Mapping[str, float],
    engine: Engine,
    excluded: Collection[str],
    feeds: Sequence[Feed],
    *,
    asymmetric: bool,
) -> list[Base]:
    """Return the model after SmoothQuant, without convolutions and with them, as far as that changes anything.

    Every other batch chooses the factors. Where channels are scaled, T is the largest value in all batches: nothing is
    left there that is worth clipping. Tensors keep their channels if T was given, or comes from a criterion other than
    `max` that has no guard.
    """
    if not isinstance(calibration, Calibration):
        return []
    layers, bases = calibration.thresholds, list[Base]()

    def wanted(name: str) -> bool:
        free = name not in layers or layers[name].guarded or layers[name].criterion == "max"
        return free and name not in excluded

    for convolutions in (False, True) if find_convolutions(keep_body_inputs(prepared.graph)) else (False,):
        found = smoothed(prepared, feeds[::2], wanted=wanted, convolutions=convolutions)
        if any(found.tensors == base.scaled for base in bases):
            continue
        changed = prepare(found.model)
        names = [name for name in observed_tensors(changed.graph) if name in found.tensors]
        if names:
            again = _recalibrated(changed, calibration, names, feeds)
            ranges = find_ranges(changed, again, engine, asymmetric=asymmetric)
            wide = _wide(changed, again, engine, asymmetric=asymmetric)
            bases.append(Base(changed, [ranges, wide], found.tensors, convolutions))
    return bases


def _recalibrated(prepared: Prepared, calibration: Calibration, names: list[str], feeds: Sequence[Feed]) -> Calibration:
    """Return a calibration of the model with scaled channels, which observes only these tensors anew."""
    options: dict[str, Any] = {"num_bins": calibration.settings.num_bins, "include": names}
    new = calibrate(prepared, feeds, criterion="max", progress=False, **options)
    fields = ("amax", "histograms", "thresholds", "ranges", "zeros", "beyond")
    joined: dict[str, Any] = {one: {**getattr(calibration, one), **getattr(new, one)} for one in fields}
    return calibration._replace(model=new.model, **joined)
