"""Draw docs/search.svg, the picture of docs/search.md: ``python docs/draw_search.py``."""

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import klquant

TARGET = Path(__file__).with_name("search.svg")
BLUE, RED, GREY = "#0072B2", "#D55E00", "0.75"  # told apart by all kinds of colour vision
BINS, LEVELS, HALF = 61, 7, 10  # of the small histogram
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "klquant", "font.family": "sans-serif", "font.size": 9}


def draw_candidate(ax: Axes, x: np.ndarray[Any, Any]) -> None:
    """Draw one candidate of a small histogram: P, what is clipped, and Q."""
    hist, edges = klquant.histogram(x, num_bins=BINS)
    centre = BINS // 2
    start, stop = centre - HALF, centre + HALF + 1
    p, sliced = hist[start:stop].astype(float), hist[start:stop].copy()
    p[0], p[-1] = hist[: start + 1].sum(), hist[stop - 1 :].sum()
    sliced[0] = 0
    ax.stairs(hist, edges, fill=True, color=GREY, label="histogram")
    ax.stairs(p, edges[start : stop + 1], color="black", label="P: outliers join the end bins")
    q = klquant.quantized_distribution(sliced, p, num_quantized_bins=LEVELS)
    ax.stairs(
        q, edges[start : stop + 1], color=BLUE, linewidth=1.5, label=f"Q: {LEVELS} levels, spread over their bins"
    )
    for side in (-1, 1):
        ax.axvline(side * edges[stop], color=RED, linestyle="--", label="± candidate T" if side == 1 else None)
    ax.set(title=f"1. One candidate, with {BINS} bins and {LEVELS} levels", xlabel="activation", ylabel="count")
    ax.legend(loc="upper right", fontsize=8)


def draw_curve(ax: Axes, x: np.ndarray[Any, Any]) -> None:
    """Draw the divergence of all candidates, and the minimum."""
    hist, edges = klquant.histogram(x, num_bins=2001)
    curve, found = klquant.divergence_curve(hist, edges), klquant.optimal_threshold(hist, edges)
    ax.plot(edges[-len(curve) :] / edges[-1], curve, color=BLUE)
    ratio = found.value / edges[-1]
    ax.axvline(ratio, color=RED, label=f"T = {ratio:.2f} amax, {found.clipped:.3%} clipped")
    ax.set(title="2. All candidates, 2001 bins, 255 levels", xlabel="T / amax", ylabel="divergence, nats", yscale="log")
    ax.legend(loc="upper center", fontsize=8)


def draw_chains(ax: Axes) -> None:
    """Draw the groups of the candidates with one merge factor, and which of them share borders."""
    levels, factor, halves = 9, 3, range(13, 18)
    for row, half in enumerate(halves):
        starts = factor * np.arange(levels) - half
        widths = np.diff(starts, append=half + 1)  # the last group takes the remainder
        colour = BLUE if (half - halves[0]) % factor == 0 else GREY
        ax.broken_barh(list(zip(starts, widths, strict=True)), (row - 0.35, 0.7), facecolor=colour, edgecolor="white")
    ax.set(
        title=f"3. The {levels} groups of neighbouring candidates, m = {factor} bins each",
        xlabel="bin, from the centre",
    )
    ax.set_yticks(range(len(halves)), [f"i = {half}" for half in halves])
    ax.invert_yaxis()


def main(target: Path = TARGET) -> None:
    """Write the picture."""
    x = np.random.default_rng(0).laplace(size=100_000)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 8), layout="constrained")
        first, second, third = figure.subplots(3, 1, height_ratios=(3, 3, 2))
        draw_candidate(first, x[:2_000])
        draw_curve(second, x)
        draw_chains(third)
        figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
