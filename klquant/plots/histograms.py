"""Plots of a histogram with its thresholds, and of the divergence of every candidate."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from klquant._namespace import Array
from klquant._validate import check_histogram, check_positive
from klquant.backends.text import percent
from klquant.divergence import EPS
from klquant.errors import InvalidInputError
from klquant.plots.style import BLUE, GREY, RED, Style, axes_or_new, choose_styles
from klquant.threshold import divergence_curve, optimal_threshold

_LEAST = 1e-9  # nats: a logarithmic axis has no 0


def plot_histogram(
    hist: Array,
    edges: Array,
    *,
    thresholds: Mapping[str, Any] | None = None,
    log: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw a histogram, and lines at +-T of each threshold.

    Parameters
    ----------
    hist, edges : array, shapes (num_bins,) and (num_bins + 1,)
        One histogram, as for :func:`klquant.optimal_threshold`.
    thresholds : mapping, optional
        T by name: a :class:`klquant.Threshold`, a LayerThreshold, or a number in units of the edges.
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
        For a batch of histograms, a threshold that is not positive and finite, and as for
        :func:`klquant.optimal_threshold`.
    ArrayTypeError
        For lists, torch tensors, and arrays of different libraries.

    Notes
    -----
    If nothing was counted below the centre bin, as after a ReLU, only the right half is drawn.

    Examples
    --------
    >>> import numpy as np, klquant
    >>> from matplotlib.figure import Figure
    >>> hist, edges = klquant.histogram(np.random.default_rng(0).laplace(size=10_000), num_bins=401)
    >>> found = {"entropy": klquant.optimal_threshold(hist, edges), "max": klquant.max_threshold(hist, edges)}
    >>> ax = plot_histogram(hist, edges, thresholds=found, ax=Figure().subplots())
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['8.79 (entropy), 0.01%', '11.95 (max), 0%']
    """
    counts, bounds = _one_histogram(hist, edges)
    lines = _threshold_lines(thresholds or {})
    ax = axes_or_new(ax, (7, 4))
    centre, signs = len(counts) // 2, [1, -1]
    if not counts[:centre].any():
        counts, bounds, signs = counts[centre:], bounds[centre:], [1]
    ax.stairs(counts, bounds, fill=True, facecolor="0.8", edgecolor=GREY, linewidth=0.5)
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
    """Draw the KL divergence of every candidate threshold and mark the minimum.

    Parameters
    ----------
    hist, edges : array, shapes (num_bins,) and (num_bins + 1,)
        One histogram, as for :func:`klquant.optimal_threshold`.
    num_quantized_bins, eps, one_sided
        As for :func:`klquant.optimal_threshold`.
    without_zeros : bool
        Set the centre bin to 0 first, as the calibration of models does.
    log : bool
        Use a logarithmic axis for the divergence. Lower values are drawn at 1e-9 nats.
    ax : matplotlib.axes.Axes, optional
        Where to draw.

    Returns
    -------
    matplotlib.axes.Axes
        Infeasible candidates are gaps in the curve.

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
    curve, best = divergence_curve(counts, bounds, **options), optimal_threshold(counts, bounds, **options)
    ax = axes_or_new(ax, (7, 4))
    least = _LEAST if log else 0.0
    feasible = np.pad(np.isfinite(curve), 1)
    alone = feasible[1:-1] & ~feasible[:-2] & ~feasible[2:]  # drawn as points: a line needs two
    drawn = np.where(feasible[1:-1], np.maximum(curve, least), np.nan)
    ax.plot(bounds[-len(curve) :], drawn, color=BLUE, marker=".", markevery=np.flatnonzero(alone).tolist())
    ax.axvline(best.value, color=RED, linewidth=0.8)
    label = f"{best.divergence:.3g} nats at T = {best.value:.4g}"
    ax.plot(best.value, max(best.divergence, least), "o", color=RED, label=label)
    ax.set_yscale("log" if log else "linear")
    ax.set(xlabel="candidate T, in units of the tensor", ylabel="KL divergence, nats")
    _legend(ax, "minimum")
    return ax


def _one_histogram(hist: Array, edges: Array, num_quantized_bins: int = 3) -> tuple[Array, Array]:
    """Return one histogram as NumPy arrays, checked as the searches check it."""
    check_histogram(hist, edges, num_quantized_bins)
    if hist.ndim != 1:
        raise InvalidInputError(f"`hist` must be one histogram, got a batch of shape {tuple(hist.shape)}; choose one")
    return np.asarray(hist), np.asarray(edges)


def _threshold_lines(thresholds: Mapping[str, Any]) -> list[tuple[float, str, Style]]:
    """Return T, legend text and style of each threshold."""
    if not isinstance(thresholds, Mapping):
        raise InvalidInputError(f"`thresholds` must map names to T, got {type(thresholds).__name__}")
    styles, lines = choose_styles(thresholds), []
    for name, found in thresholds.items():
        given = np.asarray(getattr(found, "threshold", getattr(found, "value", found)))
        if given.ndim:
            raise InvalidInputError(f"`thresholds[{name!r}]` must be one number, got shape {given.shape}")
        value = float(given)
        check_positive(f"thresholds[{name!r}]", value)
        beyond = f", {percent(float(found.clipped))}" if hasattr(found, "clipped") else ""
        lines.append((value, f"{value:.4g} ({name}){beyond}", styles[name]))
    return lines


def _legend(ax: Axes, title: str) -> None:
    """Draw the legend. A `$` in a name does not start a formula."""
    for text in ax.legend(title=title, loc="upper right", fontsize="small", title_fontsize="small").get_texts():
        text.set_parse_math(False)
