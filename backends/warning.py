"""Warnings that point at the line outside klquant that caused them."""

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from klquant.errors import CalibrationWarning


def warn(message: str, better: Mapping[str, str] | None = None) -> None:
    """Issue a CalibrationWarning at the nearest caller outside klquant; `better` are criteria to override, by layer."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("klquant."):
        level, frame = level + 1, frame.f_back
    warning = CalibrationWarning(message)
    warning.better = dict(better or {})
    warnings.warn(warning, stacklevel=level)


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore CalibrationWarnings inside, of models that are only tried."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        yield


def warn_of_floats(kind: str, reasons: Mapping[str, str]) -> None:
    """Warn of layers or nodes (`kind`) that stay in floating point, once per reason. `reasons` is by name."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(f"`{name}`")
    for reason, who in names.items():
        subject = f"{kind} {who[0]} stays" if len(who) == 1 else f"{kind}s {', '.join(who)} stay"
        warn(f"{subject} in floating point: {reason}")
