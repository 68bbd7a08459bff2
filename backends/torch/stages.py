"""The stages of calibration, and what comes out in the end."""

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import nn

import klquant
from klquant.errors import StageError

from ..calibration import Calibration
from ..html_tables import html_skipped, html_thresholds
from ..settings import EXCLUDED
from ..thresholds import LayerThreshold
from ..warning import warn_of_floats
from .folding.apply import Fold

NEVER_CALLED = "it was never called"


class Stage(IntEnum):
    """What has been done to a model."""

    LOADED = 0
    FOLDED = 1
    WEIGHTS_QUANTIZED = 2
    AMAX_COLLECTED = 3
    HISTOGRAMS_COLLECTED = 4
    CALIBRATED = 5


_HOW_TO_REACH = {
    Stage.FOLDED: "fold(batch)",
    Stage.WEIGHTS_QUANTIZED: "quantize_weights()",
    Stage.AMAX_COLLECTED: "collect_amax(batches)",
    Stage.HISTOGRAMS_COLLECTED: "collect_histograms(batches)",
    Stage.CALIBRATED: "search_thresholds()",
}


class QuantizedModel(NamedTuple):
    """A model quantized."""

    model: nn.Module
    """Simulates INT8 inference; use it like the model it came from."""
    thresholds: dict[str, LayerThreshold]
    """amax, T, divergence and clipped share of each layer, by qualified name."""
    weight_scales: dict[str, torch.Tensor]
    """Scale per output channel of each layer's weights."""
    histograms: dict[str, klquant.Histogram]
    """What was observed, with the zeros."""
    folds: list[Fold]
    """What became of each BatchNorm and ReLU."""
    skipped: dict[str, str]
    """What stays in floating point, by qualified name, and why."""
    calibration: Calibration
    """All that was found, to be saved."""

    def _repr_html_(self) -> str:
        """Return a table of the thresholds for notebooks."""
        caption = f"{type(self.model).__name__} quantized: {len(self.thresholds)} layers"
        return html_thresholds(caption, "layer", self.thresholds) + html_skipped(self.skipped)


def check_stage(reached: Stage, needed: Stage) -> None:
    """Raise a StageError that names the missing call."""
    if reached < needed:
        missing = Stage(reached + 1)
        raise StageError(
            f"expected stage {needed.name}, got a model at stage {reached.name}; call {_HOW_TO_REACH[missing]} first"
        )


def tell_of_floats(found: Calibration) -> None:
    """Warn of what stays in floating point without having been asked to."""
    reasons = {name: reason for name, reason in found.skipped.items() if reason != EXCLUDED}
    if not found.skipped and not found.thresholds:
        reasons = {"": "the model has no layer that can be quantized"}
    warn_of_floats("layer", reasons)
