"""The stages of a calibration, and its result."""

from collections.abc import Collection, Iterable, Mapping
from enum import IntEnum
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn

import klquant
from klquant.errors import InvalidInputError, StageError

from ..calibration import Calibration
from ..html_tables import html_skipped, html_thresholds
from ..reprs import counted, criteria, left_out, refuse_call
from ..settings import EXCLUDED
from ..thresholds import LayerThreshold
from ..warning import warn_of_floats
from .folding.apply import Fold
from .model.forward import Forward, call_model

NEVER_CALLED = "it was never called"


class Stage(IntEnum):
    """How far a model has come; each stage needs the one before it."""

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


class Source:
    """How to run a model on the data of its calibration. A copy or file of a result does not contain the data."""

    def __init__(self, forward: Forward = call_model, batches: Iterable[Any] | None = None) -> None:
        self.forward, self.batches = forward, batches

    def __deepcopy__(self, memo: Any) -> "Source":
        return self

    def __reduce__(self) -> tuple[type["Source"], tuple[()]]:
        return Source, ()


class QuantizedModel(NamedTuple):
    """A quantized model."""

    model: nn.Module
    """Simulates INT8 inference; call it like the original."""
    thresholds: dict[str, LayerThreshold]
    """By qualified layer name: amax, T, divergence, clipped share."""
    weight_scales: dict[str, torch.Tensor]
    """By qualified layer name: the scale of each output channel of the weights."""
    histograms: dict[str, klquant.Histogram]
    """What was observed, zeros included."""
    folds: list[Fold]
    """What happened to each BatchNorm and ReLU."""
    skipped: dict[str, str]
    """By qualified name: why something stays in floating point."""
    calibration: Calibration
    """Everything that was found; ``calibration.save(path)`` saves it."""
    source: Source = Source()
    """The data and how to run the model on them, for :func:`export_onnx`."""

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        """Raise ArrayTypeError, which names `.model`."""
        refuse_call(self)

    def __repr__(self) -> str:
        """Return the result in one line."""
        layers = f"{counted(len(self.thresholds), 'layer')} in INT8 ({criteria(self.thresholds)})"
        return f"QuantizedModel({type(self.model).__name__}, {layers}{left_out(self.skipped)})"

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


def check_layers(chosen: Collection[str], names: Collection[str], skipped: Mapping[str, str]) -> None:
    """Raise InvalidInputError if no layer can be quantized, unless :func:`warn_of_skipped` has something to name."""
    if chosen or (not names and skipped.keys() - {""}):
        return
    why = f"{len(names)} are excluded" if names else "the model has no convolution or linear layer of a plain type"
    reason = f"; {skipped['']}" if "" in skipped else ""
    raise InvalidInputError(f"expected layers that can be quantized, got none: {why}{reason}")


def warn_of_skipped(found: Calibration) -> None:
    """Warn of what stays in floating point although it is not excluded."""
    reasons = {name or "(the model itself)": reason for name, reason in found.skipped.items() if reason != EXCLUDED}
    warn_of_floats("layer", reasons)
