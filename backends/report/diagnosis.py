"""Parts of a report from outside the calibration: a diagnosis, and the ranges of the weights."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from klquant.errors import InvalidInputError

from ..calibration import Calibration
from .charts import short

Array: TypeAlias = "np.ndarray[Any, Any]"
MAX_PROFILE = 64
MAX_SCALE = 1e300  # times the number of levels, it is still a finite float
_OF_A_LAYER = (
    "weight_sqnr_db",
    "activation_sqnr_db",
    "output_sqnr_db",
    "output_cosine",
    "alone_sqnr_db",
    "without_sqnr_db",
)
_OF_THE_MODEL = ("model_sqnr_db", "model_cosine")


class HasJson(Protocol):
    """A Diagnosis of any backend."""

    def as_json(self) -> str:
        """Return its numbers as JSON."""
        ...


Diagnosed: TypeAlias = HasJson | Mapping[str, Any]


class Weights(NamedTuple):
    """Ranges of one layer's output channels: scale times the largest level."""

    name: str
    num_channels: int
    num_dead: int
    """Channels of scale 0."""
    smallest: float
    """Of the channels that are not dead; 0 if all are."""
    median: float
    largest: float
    widest_channel: int
    """Index of the channel with the largest range."""
    profile: list[float]
    """Ranges in falling order. Of more than 64 channels, 64 with evenly spaced ranks, including both ends."""


def describe_weights(scales: Mapping[str, Any], calibration: Calibration) -> list[Weights]:
    """Return the ranges of each layer's weights."""
    described = []
    for name, given in scales.items():
        found = calibration.thresholds.get(name)
        bits = found.num_bits if found else calibration.settings.num_bits
        described.append(_weights(name, _checked_scale(name, given) * (2 ** (bits - 1) - 1)))
    return described


def check_diagnosis(diagnosis: Diagnosed, names: Iterable[str]) -> dict[str, Any]:
    """Return a diagnosis of these layers as plain data.

    It is read through its JSON, so that no framework is needed.
    """
    content: Any = json.loads(diagnosis.as_json()) if hasattr(diagnosis, "as_json") else diagnosis
    if not isinstance(content, Mapping) or not isinstance(content.get("layers"), list):
        raise InvalidInputError(
            f"`diagnosis` must be a Diagnosis or its JSON with layers, got {type(diagnosis).__name__}"
        )
    kept = {key: _number(content, key, "the model") for key in _OF_THE_MODEL}
    layers = [_checked_layer(layer) for layer in content["layers"]]
    if foreign := {layer["name"] for layer in layers} - set(names):
        raise InvalidInputError(f"`diagnosis` must be of the calibrated layers, got others: {sorted(foreign)[:10]}")
    return {**kept, "layers": layers}


def _weights(name: str, ranges: Array) -> Weights:
    widest, falling = int(ranges.argmax()), np.sort(ranges)[::-1]
    alive = ranges[ranges > 0] if ranges.any() else np.zeros(1)
    picked = np.linspace(0, len(ranges) - 1, min(len(ranges), MAX_PROFILE)).round().astype(int)
    spread = float(alive.min()), float(np.median(alive)), float(alive.max())
    return Weights(name, len(ranges), int((ranges == 0).sum()), *spread, widest, short(falling[picked]))


def _checked_layer(layer: Any) -> dict[str, Any]:
    if not isinstance(layer, Mapping) or not isinstance(layer.get("name"), str):
        raise InvalidInputError(f"`diagnosis` must name each of its layers, got {layer!r}")
    numbers = {key: _number(layer, key, f"layer `{layer['name']}`") for key in _OF_A_LAYER}
    return {"name": layer["name"], **numbers, "note": str(layer.get("note", ""))}


def _number(content: Mapping[str, Any], key: str, whose: str) -> float | None:
    value = content.get(key, "nothing")
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise InvalidInputError(f"`diagnosis` must have a number or null as {key} of {whose}, got {value!r}")
    return value


def _checked_scale(name: str, given: Any) -> Array:
    """Return scales as an array. Tensors of any framework and device have `tolist`."""
    listed = given.tolist() if hasattr(given, "tolist") else given
    try:
        scale = np.atleast_1d(np.asarray(listed, np.float64))
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"`weight_scales` of layer `{name}` must be numbers, got {given!r}") from error
    if scale.ndim != 1 or not scale.size or not ((scale >= 0) & (scale <= MAX_SCALE)).all():
        raise InvalidInputError(
            f"`weight_scales` of layer `{name}` must list numbers from 0 to {MAX_SCALE}, got {given!r}"
        )
    return scale
