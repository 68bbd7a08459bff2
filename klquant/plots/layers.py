"""The thresholds of all layers."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from klquant.backends.text import ratio, threshold_cells
from klquant.backends.thresholds import LayerThreshold
from klquant.errors import InvalidInputError
from klquant.plots.style import axes_or_new, choose_styles

Sort: TypeAlias = Literal["model", "ratio", "clipped", "sqnr_db"]

_WIDTHS = {"amax": 9, "T": 9, "clipped": 10, "SQNR dB": 7}  # characters of a column
_LONGEST = 40  # characters of a name
_ALPHA = 0.6
_ROW = 0.17  # inches for a layer
_LINE = 1.2  # height of a line over the font size


class HasThresholds(Protocol):
    """A Calibration, or the result of quantizing a model."""

    @property
    def thresholds(self) -> Mapping[str, LayerThreshold]:
        """The threshold of each layer or tensor."""
        ...


def plot_layers(
    thresholds: Mapping[str, LayerThreshold] | HasThresholds, *, sort: Sort = "model", ax: Axes | None = None
) -> Axes:
    """Draw T / amax of every layer as a bar, coloured by criterion, with amax, T, clipped share and SQNR beside it.

    Parameters
    ----------
    thresholds : mapping, or Calibration
        What was found, by name of the layer or tensor; what has such ``thresholds``, as the result of
        :func:`klquant.backends.torch.quantize`, will do as well.
    sort : {"model", "ratio", "clipped", "sqnr_db"}
        Keep the order, or begin with the smallest T / amax, the largest clipped share, the lowest SQNR.
    ax : matplotlib.axes.Axes, optional
        Where to draw. Without it the figure is as high as the layers need; in a lower one names and numbers are left
        out where they would overlap.

    Returns
    -------
    matplotlib.axes.Axes
        The first layer is the uppermost.

    Raises
    ------
    InvalidInputError
        For no layers, something other than a LayerThreshold, naming it, or another `sort`.

    Examples
    --------
    >>> from klquant.backends.thresholds import LayerThreshold
    >>> from matplotlib.figure import Figure
    >>> ax = plot_layers({"fc": LayerThreshold(2.0, 1.5, 0.01, 1e-4, 38.0)}, ax=Figure().subplots())
    >>> [float(bar.get_width()) for bar in ax.patches]
    [0.75]
    """
    layers = _sorted(_layers(thresholds), sort)
    ax = axes_or_new(ax, (9, 1.1 + _ROW * len(layers)))
    styles = choose_styles(dict.fromkeys(found.criterion for _, found in layers))
    ratios = [ratio(found) for _, found in layers]
    ax.barh(range(len(layers)), ratios, color=[styles[found.criterion][0] for _, found in layers], alpha=_ALPHA)
    ax.set(xlabel="T / amax", xlim=(0, np.nanmax([1.0, *ratios])), ylim=(len(layers) - 0.5, -0.5), axisbelow=True)
    ax.grid(axis="x", color="0.85")
    _label_rows(ax, layers)
    if len(styles) > 1:
        patches = [Patch(color=colour, alpha=_ALPHA, label=criterion) for criterion, (colour, _) in styles.items()]
        above: dict[str, Any] = {"bbox_to_anchor": (0, 1), "borderaxespad": 1.6, "frameon": False}
        ax.legend(handles=patches, ncols=len(patches), loc="lower left", **above)
    return ax


def _layers(thresholds: Any) -> list[tuple[str, LayerThreshold]]:
    """Return the layers in their order, checked."""
    found = getattr(thresholds, "thresholds", thresholds)
    if not isinstance(found, Mapping):
        raise InvalidInputError(f"`thresholds` must be a Calibration or a mapping, got {type(found).__name__}")
    if not found:
        raise InvalidInputError("`thresholds` must have a layer, got none; call search_thresholds() first")
    for name, layer in found.items():
        if not isinstance(layer, LayerThreshold):
            raise InvalidInputError(f"`thresholds[{name!r}]` must be a LayerThreshold, got {type(layer).__name__}")
    return list(found.items())


def _sorted(layers: list[tuple[str, LayerThreshold]], sort: Sort) -> list[tuple[str, LayerThreshold]]:
    """Return the layers with what a person should look at first; what has no number comes last."""
    keys: dict[Sort, Callable[[LayerThreshold], float]] = {
        "model": lambda _: 0.0,
        "ratio": ratio,
        "clipped": lambda found: -found.clipped,
        "sqnr_db": lambda found: found.sqnr_db,
    }
    if sort not in keys:
        raise InvalidInputError(f"`sort` must be one of {', '.join(keys)}, got {sort!r}")
    return sorted(layers, key=lambda layer: math.inf if math.isnan(key := keys[sort](layer[1])) else key)


def _label_rows(ax: Axes, layers: list[tuple[str, LayerThreshold]]) -> None:
    """Write the name at the left of each row and its numbers at the right, as many as there is room for."""
    room = 72 * ax.bbox.height / ax.figure.dpi / len(layers)  # points for a row
    size = min(max(room / _LINE, 5), 9)
    rows = range(0, len(layers), math.ceil(_LINE * size / room))
    ax.set_yticks(rows, [_short(layers[k][0]) for k in rows], fontsize=size, parse_math=False)
    numbers = ax.secondary_yaxis("right")
    numbers.set_yticks(rows, [_line(threshold_cells(layers[k][1])) for k in rows], fontsize=size, family="monospace")
    for axis in (ax, numbers):
        axis.tick_params(axis="y", length=0)
    ax.annotate(
        _line({column: column for column in _WIDTHS}),
        (1, 1),
        xytext=(4, 3),
        xycoords="axes fraction",
        textcoords="offset points",
        size=size,
        family="monospace",
    )


def _line(cells: Mapping[str, str]) -> str:
    return " ".join(cells[column].rjust(width) for column, width in _WIDTHS.items())


def _short(name: str) -> str:
    """Return a name without its middle if it is long, and without line breaks."""
    name = " ".join(name.split())
    if len(name) <= _LONGEST:
        return name
    return f"{name[: _LONGEST // 3]}\N{HORIZONTAL ELLIPSIS}{name[-_LONGEST // 3 * 2 :]}"
