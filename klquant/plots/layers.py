"""A bar chart of the thresholds of all layers."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

import klquant
from klquant.backends.settings import check_choice
from klquant.backends.text import ratio, threshold_cells
from klquant.backends.thresholds import LayerThreshold
from klquant.errors import InvalidInputError
from klquant.plots.style import axes_or_new, choose_styles

Sort: TypeAlias = Literal["model", "ratio", "clipped", "sqnr_db"]

_WIDTHS = {"amax": 9, "T": 9, "clipped": 10, "SQNR dB": 7}  # characters of a column
_LONGEST = 40  # characters of a name
_ALPHA = 0.6
_ROW = 0.17  # height of a layer, in inches
_LINE = 1.2  # line height / font size


class HasThresholds(Protocol):
    """A Calibration, or the result of quantizing a model."""

    @property
    def thresholds(self) -> Mapping[str, LayerThreshold]:
        """The threshold of each layer or tensor."""
        ...


def plot_layers(
    thresholds: Mapping[str, LayerThreshold | klquant.Threshold] | HasThresholds,
    *,
    sort: Sort = "model",
    ax: Axes | None = None,
) -> Axes:
    """Draw T / amax of every layer as a bar, coloured by criterion, with amax, T, clipped share and SQNR beside it.

    Parameters
    ----------
    thresholds : mapping, or Calibration
        Thresholds by name of the layer or tensor, or an object with such ``thresholds``, such as the result of
        :func:`klquant.backends.torch.quantize`. For thresholds of the core, such as those of
        :func:`klquant.optimal_threshold`, whose amax is unknown, the bars show T.
    sort : {"model", "ratio", "clipped", "sqnr_db"}
        Keep the order of the model, or start with the smallest T / amax, the largest clipped share or the lowest SQNR.
    ax : matplotlib.axes.Axes, optional
        Where to draw. By default a new figure, high enough for all layers. In lower Axes some names and numbers are
        left out so that they do not overlap.

    Returns
    -------
    matplotlib.axes.Axes
        The first layer is at the top.

    Raises
    ------
    InvalidInputError
        If there are no layers, an entry is no threshold, or `sort` is unknown.

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
    known = not any(math.isnan(found.amax) for _, found in layers)
    values = [ratio(found) if known else found.threshold for _, found in layers]
    ax.barh(range(len(layers)), values, color=[styles[found.criterion][0] for _, found in layers], alpha=_ALPHA)
    right = np.nanmax([1.0, *values] if known else values)
    ax.set(xlabel="T / amax" if known else "T", xlim=(0, right), ylim=(len(layers) - 0.5, -0.5), axisbelow=True)
    ax.grid(axis="x", color="0.85")
    _label_rows(ax, layers)
    if len(styles) > 1:
        patches = [Patch(color=colour, alpha=_ALPHA, label=criterion) for criterion, (colour, _) in styles.items()]
        above: dict[str, Any] = {"bbox_to_anchor": (0, 1), "borderaxespad": 1.6, "frameon": False}
        ax.legend(handles=patches, ncols=len(patches), loc="lower left", **above)
    return ax


def _layers(thresholds: Any) -> list[tuple[str, LayerThreshold]]:
    """Return the layers in their order, after checks."""
    found = getattr(thresholds, "thresholds", thresholds)
    if not isinstance(found, Mapping):
        raise InvalidInputError(f"`thresholds` must be a Calibration or a mapping, got {type(found).__name__}")
    if not found:
        raise InvalidInputError("`thresholds` must have at least one layer, got none; call search_thresholds() first")
    return [(name, _layer(name, layer)) for name, layer in found.items()]


def _layer(name: str, found: Any) -> LayerThreshold:
    """Return a LayerThreshold, also for a Threshold of the core or a number, whose amax is unknown."""
    if isinstance(found, LayerThreshold):
        return found
    if isinstance(found, klquant.Threshold) and np.ndim(found.value) == 0:
        criterion = "other" if math.isnan(float(found.divergence)) else "entropy"
        numbers = float(found.value), float(found.divergence), float(found.clipped), float(found.sqnr_db)
        return LayerThreshold(math.nan, *numbers, criterion)
    expected = "a LayerThreshold or the Threshold of one histogram"
    raise InvalidInputError(f"`thresholds[{name!r}]` must be {expected}, got {type(found).__name__}")


def _sorted(layers: list[tuple[str, LayerThreshold]], sort: Sort) -> list[tuple[str, LayerThreshold]]:
    """Return the layers with the worst first, and those without a number last."""
    keys: dict[Sort, Callable[[LayerThreshold], float]] = {
        "model": lambda _: 0.0,
        "ratio": ratio,
        "clipped": lambda found: -found.clipped,
        "sqnr_db": lambda found: found.sqnr_db,
    }
    check_choice("sort", sort, keys)
    return sorted(layers, key=lambda layer: math.inf if math.isnan(key := keys[sort](layer[1])) else key)


def _label_rows(ax: Axes, layers: list[tuple[str, LayerThreshold]]) -> None:
    """Write names on the left and numbers on the right, for as many rows as fit."""
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
    """Return a name without line breaks, shortened in the middle if it is long."""
    name = " ".join(name.split())
    if len(name) <= _LONGEST:
        return name
    return f"{name[: _LONGEST // 3]}\N{HORIZONTAL ELLIPSIS}{name[-_LONGEST // 3 * 2 :]}"
