"""Choose a criterion for each tensor by the errors that the thresholds cause on data."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from klquant.errors import InvalidInputError

from ..thresholds import LayerThreshold

PREFERENCE = ("entropy", "mse", "percentile", "max")  # among equals


class Choice(NamedTuple):
    """The best criterion for one tensor."""

    criterion: str
    errors: dict[str, float]
    """Squared error of the layer's output, summed over the data, by criterion."""


def choose(errors: Mapping[str, float]) -> Choice:
    """Return the criterion with the least error, the preferred one among equals."""
    order = sorted(errors, key=lambda name: PREFERENCE.index(name) if name in PREFERENCE else len(PREFERENCE))
    best = min(order, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    return Choice(best, dict(errors))


def check_candidates(candidates: Mapping[str, Mapping[str, LayerThreshold]]) -> None:
    """Raise InvalidInputError unless there are criteria, all with thresholds of the same layers."""
    if not candidates:
        raise InvalidInputError("`candidates` must hold the thresholds of at least one criterion, got none")
    layers = set().union(*candidates.values())
    if differing := {name for name in layers if not all(name in found for found in candidates.values())}:
        raise InvalidInputError(
            f"`candidates` must hold the same layers for each criterion, got some without {sorted(differing)}"
        )


def distinct_thresholds(
    candidates: Mapping[str, Mapping[str, LayerThreshold]],
) -> dict[str, dict[float, LayerThreshold]]:
    """Return the different thresholds of each layer, by T: each causes an error that has to be measured once."""
    layers = next(iter(candidates.values()))
    return {name: {found[name].threshold: found[name] for found in candidates.values()} for name in layers}


def choose_all(
    candidates: Mapping[str, Mapping[str, LayerThreshold]], errors: Mapping[str, Mapping[float, float]]
) -> dict[str, Choice]:
    """Return the choice for each layer, from the errors by layer and T."""
    return {
        name: choose({criterion: by_threshold[found[name].threshold] for criterion, found in candidates.items()})
        for name, by_threshold in errors.items()
    }
