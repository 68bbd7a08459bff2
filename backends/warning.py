"""Warnings that point at the line of the user's that led to them, however deep they are raised."""

import sys
import warnings

from klquant.errors import CalibrationWarning


def warn(message: str) -> None:
    """Warn with a CalibrationWarning from the nearest caller outside klquant."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("klquant."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, CalibrationWarning, stacklevel=level)
