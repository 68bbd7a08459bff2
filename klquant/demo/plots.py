"""The picture of one layer: its histogram with T marked, and the divergence of every candidate."""

import io

from matplotlib.figure import Figure

import klquant
from klquant.backends.torch import LayerThreshold
from klquant.plots import plot_divergence, plot_histogram


def plot_layer(name: str, layer: LayerThreshold, histogram: klquant.Histogram) -> bytes:
    """Return a PNG with two panels for one layer."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    figure.suptitle(f"{name}: T = {layer.threshold:.4g}, {layer.threshold / layer.amax:.0%} of amax = {layer.amax:.4g}")
    plot_histogram(*histogram, thresholds={layer.criterion: layer}, ax=upper).set_xlabel("")
    plot_divergence(*histogram, without_zeros=True, ax=lower)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
