"""Colours and dashes of the criteria, and the Axes to draw on."""

import itertools
from collections.abc import Collection
from typing import Any, TypeAlias

from matplotlib.axes import Axes

from klquant.errors import InvalidInputError

Style: TypeAlias = tuple[str, Any]  # colour of Okabe and Ito, safe for all kinds of colour vision, and dashes

BLUE, RED, GREY = "#0072B2", "#D55E00", "0.45"
_STYLES: dict[str, Style] = {
    "entropy": (BLUE, "-"),
    "mse": (RED, "--"),
    "percentile": ("#CC79A7", (0, (2, 1))),
    "max": ("black", "-."),
    "fixed": ("#009E73", (0, (8, 2))),
    "none": (GREY, ":"),
}
_SPARE: tuple[Style, ...] = (("#E69F00", (0, (4, 1, 1, 1))), ("#56B4E9", (0, (1, 1))))


def choose_styles(names: Collection[str]) -> dict[str, Style]:
    """Return a style for every name. Each criterion has a fixed style."""
    spare = itertools.cycle([*_SPARE, *(style for name, style in _STYLES.items() if name not in names)])
    return {name: _STYLES[name] if name in _STYLES else next(spare) for name in names}


def axes_or_new(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """Return the given Axes, or those of a new pyplot figure, which notebooks show."""
    if ax is None:
        from matplotlib import pyplot  # imported late: it has global state and looks for a display

        return pyplot.subplots(figsize=size, layout="constrained")[1]
    if not isinstance(ax, Axes):
        raise InvalidInputError(f"`ax` must be matplotlib Axes, got {type(ax).__name__}")
    return ax
