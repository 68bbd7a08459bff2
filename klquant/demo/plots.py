"""The picture of one layer: its histogram with T marked, and the divergence of every candidate."""

import io

import numpy as np
from matplotlib.figure import Figure

import klquant
from klquant.backends.torch import LayerThreshold


def plot_layer(name: str, layer: LayerThreshold, histogram: klquant.Histogram) -> bytes:
    """Return a PNG with two panels for one layer."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    figure.suptitle(f"{name}: T = {layer.threshold:.4g}, {layer.threshold / layer.amax:.0%} of amax = {layer.amax:.4g}")

    hist, edges = histogram
    upper.stairs(hist, edges, fill=True, color="0.7")
    upper.set(yscale="log", ylabel="count per bin")
    for side in (-1, 1):
        label = f"±T, {layer.clipped:.2e} of the values beyond" if side == 1 else None
        upper.axvline(side * layer.threshold, color="tab:red", label=label)
    upper.legend(loc="upper right")

    cleared = hist.copy()
    cleared[len(hist) // 2] = 0
    curve = klquant.divergence_curve(cleared, edges)
    lower.plot(edges[-len(curve) :], np.where(np.isfinite(curve), curve, np.nan), color="tab:blue")
    lower.axvline(layer.threshold, color="tab:red", label=f"minimum: {layer.divergence:.3g} nats at T")
    lower.set(
        yscale="log", xlabel="activation (histogram), candidate threshold (divergence)", ylabel="KL divergence, nats"
    )
    lower.legend(loc="upper left")

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
