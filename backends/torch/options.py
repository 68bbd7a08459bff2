"""The keyword arguments of a Quantizer, and of what passes them on to one."""

from pathlib import Path
from typing import TypedDict

from ..accuracy.tuning import TuningOptions
from ..collection.distributed import Group
from ..settings import Engine, SettingsOptions
from .model.forward import Forward
from .model.plain import LayerTypes


class RunOptions(TypedDict, total=False):
    """How a Quantizer runs the model; not saved with the calibration."""

    forward: Forward
    progress: bool
    process_group: Group
    resume: str | Path | None
    checkpoint_seconds: float
    keep_bytes: int
    layer_types: LayerTypes | None


class SimulationOptions(SettingsOptions, total=False):
    """The settings, and the engine whose rounding is simulated."""

    engine: Engine | None


class QuantizerOptions(RunOptions, SimulationOptions, total=False):
    """All keyword arguments of a Quantizer."""


class TorchTuningOptions(TuningOptions, SimulationOptions, total=False):
    """The limits of a tuning, the settings and the engine."""
