"""Pictures for notebooks and reports, drawn by matplotlib; imported on demand.

Every function draws on the Axes that it is given and returns it. Without one it makes a new pyplot figure, which
notebooks show. Nothing global is changed.
"""

import itertools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, TypeAlias

import numpy as np

from klquant._namespace import Array
from klquant._validate import check_histogram, check_positive
from klquant.backends.calibration import Calibration
from klquant.backends.tables import number, percent, ratio
from klquant.backends.thresholds import LayerThreshold
from klquant.divergence import EPS
from klquant.errors import InvalidInputError, MissingDependencyError
from klquant.threshold import divergence_curve, optimal_threshold

try:
    from matplotlib.axes import Axes
    from matplotlib.patches import Patch
except ImportError as error:
    raise MissingDependencyError("klquant.plots needs matplotlib: pip install 'klquant[plots]'") from error

Sort: TypeAlias = Literal["model", "ratio", "clipped", "sqnr_db"]
Style: TypeAlias = tuple[str, Any]  # colour of Okabe and Ito, told apart by all kinds of colour vision, and dashes

_BLUE, _RED, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "0.45"
_STYLES: dict[str, Style] = {
    "entropy": (_BLUE, "-"),
    "mse": (_RED, "--"),
    "percentile": ("#CC79A7", (0, (2, 1))),
    "max": ("black", "-."),
    "fixed": (_GREEN, (0, (8, 2))),
    "none": (_GREY, ":"),
}
_SPARE: tuple[Style, ...] = (("#E69F00", (0, (4, 1, 1, 1))), ("#56B4E9", (0, (1, 1))))
_LEAST = 1e-9  # nats: a logarithmic axis has no 0
_COLUMNS = "{:>9} {:>9} {:>10} {:>7}"
_LONGEST = 40  # characters of a name
_ALPHA = 0.6
_ROW = 0.17  # inches for a layer
_LINE = 1.2  # height of a line over the font size


def plot_histogram(
    hist: Array,
    edges: Array,
    *,
    thresholds: Mapping[str, Any] | None = None,
    log: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw the counts, and lines at +-T of each criterion.

    Parameters
    ----------
    hist, edges : array, shapes (num_bins,) and (num_bins + 1,)
        One histogram, as for :func:`klquant.optimal_threshold`.
    thresholds : mapping, optional
        T by name: a :class:`klquant.Threshold`, a LayerThreshold of a calibration, or a number in units of the edges.
    log : bool
        Use a logarithmic axis for the counts.
    ax : matplotlib.axes.Axes, optional
        Where to draw.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InvalidInputError
        For a batch of histograms, thresholds that are not positive and finite, naming them; and as for
        :func:`klquant.optimal_threshold`.
    ArrayTypeError
        For lists, torch tensors, arrays of different libraries.

    Notes
    -----
    Where nothing was counted below the centre bin, as after a ReLU, only what is not negative is drawn.

    Examples
    --------
    >>> import numpy as np, klquant
    >>> from matplotlib.figure import Figure
    >>> hist, edges = klquant.histogram(np.random.default_rng(0).laplace(size=10_000), num_bins=401)
    >>> found = {"entropy": klquant.optimal_threshold(hist, edges), "max": klquant.max_threshold(hist, edges)}
    >>> ax = plot_histogram(hist, edges, thresholds=found, ax=Figure().subplots())
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['8.79 (entropy), 0.01 %', '11.95 (max), 0 %']
    """
    counts, bounds = _one_histogram(hist, edges)
    lines = _threshold_lines(thresholds or {})
    ax = _axes(ax, (7, 4))
    centre, signs = len(counts) // 2, [1, -1]
    if not counts[:centre].any():
        counts, bounds, signs = counts[centre:], bounds[centre:], [1]
    ax.stairs(counts, bounds, fill=True, facecolor="0.8", edgecolor=_GREY, linewidth=0.5)
    for value, label, (colour, dashes) in lines:
        for sign in signs:
            ax.axvline(sign * value, color=colour, linestyle=dashes, label=label if sign > 0 else "")
    if log and counts.any():
        ax.set_yscale("log")
        ax.set_ylim(bottom=counts[counts > 0].min(initial=1) / 2)
    ax.set(xlabel="activation, in units of the tensor", ylabel="values per bin (count)")
    if lines:
        _legend(ax, "T, share beyond")
    return ax


def plot_divergence(
    hist: Array,
    edges: Array,
    *,
    num_quantized_bins: int = 255,
    eps: float = EPS,
    one_sided: bool = False,
    without_zeros: bool = False,
    log: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw the KL divergence of every candidate threshold, and mark the minimum.

    Parameters
    ----------
    hist, edges : array, shapes (num_bins,) and (num_bins + 1,)
        One histogram, as for :func:`klquant.optimal_threshold`.
    num_quantized_bins, eps, one_sided
        As for :func:`klquant.optimal_threshold`.
    without_zeros : bool
        Set the centre bin to 0 first, as it is done where models are calibrated.
    log : bool
        Use a logarithmic axis for the divergence; what is below 1e-9 nats is drawn there.
    ax : matplotlib.axes.Axes, optional
        Where to draw.

    Returns
    -------
    matplotlib.axes.Axes
        Candidates that are infeasible are gaps in the curve.

    Raises
    ------
    InfeasibleError
        If no candidate is feasible.
    InvalidInputError, ArrayTypeError
        As for :func:`plot_histogram`.

    Examples
    --------
    >>> import numpy as np, klquant
    >>> from matplotlib.figure import Figure
    >>> hist, edges = klquant.histogram(np.random.default_rng(0).laplace(size=10_000), num_bins=401)
    >>> ax = plot_divergence(hist, edges, ax=Figure().subplots())
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['3.86e-05 nats at T = 8.79']
    """
    counts, bounds = _one_histogram(hist, edges, num_quantized_bins)
    if without_zeros:
        counts = np.where(np.arange(len(counts)) == len(counts) // 2, 0, counts)
    options: dict[str, Any] = {"num_quantized_bins": num_quantized_bins, "eps": eps, "one_sided": one_sided}
    curve, best = (search(counts, bounds, **options) for search in (divergence_curve, optimal_threshold))
    ax = _axes(ax, (7, 4))
    least = _LEAST if log else 0.0
    feasible = np.pad(np.isfinite(curve), 1)
    alone = feasible[1:-1] & ~feasible[:-2] & ~feasible[2:]  # a line needs two points
    drawn = np.where(feasible[1:-1], np.maximum(curve, least), np.nan)
    ax.plot(bounds[-len(curve) :], drawn, color=_BLUE, marker=".", markevery=np.flatnonzero(alone).tolist())
    ax.axvline(best.value, color=_RED, linewidth=0.8)
    label = f"{best.divergence:.3g} nats at T = {best.value:.4g}"
    ax.plot(best.value, max(best.divergence, least), "o", color=_RED, label=label)
    ax.set_yscale("log" if log else "linear")
    ax.set(xlabel="candidate T, in units of the tensor", ylabel="KL divergence, nats")
    _legend(ax, "minimum")
    return ax


def plot_layers(
    thresholds: Mapping[str, LayerThreshold] | Calibration, *, sort: Sort = "model", ax: Axes | None = None
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
    ax = _axes(ax, (9, 1.1 + _ROW * len(layers)))
    styles = _styles(dict.fromkeys(found.criterion for _, found in layers))
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


def _one_histogram(hist: Array, edges: Array, num_quantized_bins: int = 3) -> tuple[Array, Array]:
    """Check one histogram as the searches do, and return it as NumPy arrays."""
    check_histogram(hist, edges, num_quantized_bins)
    if hist.ndim != 1:
        raise InvalidInputError(f"`hist` must be one histogram, got a batch of shape {tuple(hist.shape)}; choose one")
    return np.asarray(hist), np.asarray(edges)


def _threshold_lines(thresholds: Mapping[str, Any]) -> list[tuple[float, str, Style]]:
    """Return T, what the legend says, and the style of each threshold."""
    if not isinstance(thresholds, Mapping):
        raise InvalidInputError(f"`thresholds` must map names to T, got {type(thresholds).__name__}")
    styles, lines = _styles(thresholds), []
    for name, found in thresholds.items():
        given = np.asarray(getattr(found, "threshold", getattr(found, "value", found)))
        if given.ndim:
            raise InvalidInputError(f"`thresholds[{name!r}]` must be one number, got shape {given.shape}")
        value = float(given)
        check_positive(f"thresholds[{name!r}]", value)
        beyond = f", {percent(float(found.clipped))}" if hasattr(found, "clipped") else ""
        lines.append((value, f"{value:.4g} ({name}){beyond}", styles[name]))
    return lines


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
    numbers.set_yticks(rows, [_numbers(layers[k][1]) for k in rows], fontsize=size, family="monospace")
    for axis in (ax, numbers):
        axis.tick_params(axis="y", length=0)
    head = _COLUMNS.format("amax", "T", "clipped", "SQNR dB")
    ax.annotate(
        head, (1, 1), xytext=(4, 3), xycoords="axes fraction", textcoords="offset points", size=size, family="monospace"
    )


def _numbers(found: LayerThreshold) -> str:
    return _COLUMNS.format(
        number(found.amax), number(found.threshold), percent(found.clipped), number(found.sqnr_db, ".1f")
    )


def _short(name: str) -> str:
    """Return a name without its middle if it is long, and without line breaks."""
    name = " ".join(name.split())
    if len(name) <= _LONGEST:
        return name
    return f"{name[: _LONGEST // 3]}\N{HORIZONTAL ELLIPSIS}{name[-_LONGEST // 3 * 2 :]}"


def _styles(names: Collection[str]) -> dict[str, Style]:
    """Return a style for every name: criteria have one of their own."""
    spare = itertools.cycle([*_SPARE, *(style for name, style in _STYLES.items() if name not in names)])
    return {name: _STYLES[name] if name in _STYLES else next(spare) for name in names}


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """Return where to draw: a new figure of pyplot's, which notebooks show, if nothing is given."""
    if ax is None:
        from matplotlib import pyplot  # has a global state and looks for a display

        return pyplot.subplots(figsize=size, layout="constrained")[1]
    if not isinstance(ax, Axes):
        raise InvalidInputError(f"`ax` must be matplotlib Axes, got {type(ax).__name__}")
    return ax


def _legend(ax: Axes, title: str) -> None:
    """Show what the lines are; a `$` in a name is no formula."""
    for text in ax.legend(title=title, loc="upper right", fontsize="small", title_fontsize="small").get_texts():
        text.set_parse_math(False)
