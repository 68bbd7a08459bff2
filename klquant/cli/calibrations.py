"""A saved calibration, and the thresholds that a command takes from it."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from klquant.backends.calibration import Calibration
from klquant.backends.settings import Criterion, Settings

from .tables import busy


def load_calibration(
    path: Path, *, criterion: Criterion | None = None, overrides: Mapping[str, Any] | None = None
) -> Calibration:
    """Read a calibration with its thresholds, searched again where another criterion is asked for.

    With a `criterion` all tensors are searched again, except for those that have one of their own; otherwise the
    tensors that match `overrides`, and all of them if there are no thresholds yet.
    """
    calibration, overrides = Calibration.load(path), overrides or {}
    Settings.make(overrides=overrides).check_patterns(calibration.amax)
    settings = Settings.make(
        **{**calibration.settings._asdict(), "overrides": {**calibration.settings.overrides, **overrides}}
    )
    again = {
        name: amax
        for name, amax in calibration.amax.items()
        if criterion or not calibration.thresholds or any(fnmatchcase(name, pattern) for pattern in overrides)
    }
    searching = calibration._replace(settings=settings, amax=again)
    with busy("searching"):
        found = searching.search_thresholds(criterion=criterion or "entropy")
    return calibration._replace(settings=settings, thresholds={**calibration.thresholds, **found})
