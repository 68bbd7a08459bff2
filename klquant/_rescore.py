"""The best candidates once more, bin by bin, to tell which of several near-ties is the first minimum.

The closed form adds numbers far larger than a small divergence and is good to about 1e-13. Here the divergence
is a sum of logarithms of ratios that are close to 1 where it is small, so it is good to its own rounding, and
exactly 0 where P and Q are equal.
"""

from types import ModuleType

from klquant._closed_form import Windows, log_kept, windows
from klquant._namespace import Array, while_loop
from klquant.divergence import smoothing_loss
from klquant.merging import merge_bounds, prefix_sums, sum_between

_NEAR = 1e-12  # nats: more than the closed form can be wrong by
_GAIN = 2.0**-52  # nats: a gain below the rounding of float64 is none; the earlier candidate stays


def first_minimum(
    curve: Array, hist: Array, num_quantized_bins: int, eps: float, *, xp: ModuleType
) -> tuple[Array, Array]:
    """Return index and divergence of the first minimum; the divergence is +inf where none is feasible."""
    sums, nonzeros = prefix_sums(hist, xp=xp), prefix_sums(hist > 0, xp=xp)
    window = windows(sums, hist.shape[0], num_quantized_bins, xp=xp)
    near = xp.isfinite(curve) & (curve <= curve.min() + _NEAR)
    index = xp.arange(curve.shape[0])

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        last_tried, _, lowest = state
        return (lowest > 0) & (near & (index > last_tried)).any()

    def try_next(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        last_tried, best, lowest = state
        k = xp.argmax(near & (index > last_tried))
        one = Windows(*(field[k] for field in window))
        divergence = _divergence(hist, sums, nonzeros, one, num_quantized_bins, eps, xp=xp)
        better = divergence < lowest - _GAIN
        return k, xp.where(better, k, best), xp.where(better, divergence, lowest)

    start = (xp.asarray(-1), xp.asarray(-1), xp.asarray(xp.inf))
    _, best, lowest = while_loop(unfinished, try_next, start, xp=xp)
    return best, lowest


def _divergence(
    hist: Array,
    sums: tuple[Array, Array],
    nonzeros: tuple[Array, Array],
    window: Windows,
    num_quantized_bins: int,
    eps: float,
    *,
    xp: ModuleType,
) -> Array:
    """Return the divergence of the one candidate with this window; all bins take part, those outside as zeros."""
    position, width = xp.arange(hist.shape[0]) - window.start, window.stop - window.start
    inside = (position >= 0) & (position < width)
    p = xp.where(inside, hist.astype(xp.float64), 0.0)
    p = xp.where(position == 0, window.first, xp.where(position == width - 1, window.last, p))

    bounds = window.start + merge_bounds(width, num_quantized_bins, xp=xp)
    low = xp.where(bounds[:-1] == window.start, window.start + 1, bounds[:-1])  # S[0] = 0
    sliced = sum_between(sums, low, bounds[1:], xp=xp) * (sum_between(nonzeros, low, bounds[1:], xp=xp) > 0)
    group = xp.clip(position // (width // num_quantized_bins), 0, num_quantized_bins - 1)
    support = xp.cumsum(xp.concatenate([xp.zeros(1, xp.int64), (p > 0).astype(xp.int64)]))
    count = support[bounds[1:]] - support[bounds[:-1]]
    q = (sliced / xp.maximum(count, 1))[group]

    loss_p = smoothing_loss((p > 0).sum(), width, eps, xp=xp)
    loss_q = smoothing_loss(((p > 0) & (q > 0)).sum(), width, eps, xp=xp)
    smooth_q = xp.where(q > 0, q - loss_q, eps)
    excess = xp.where(q > 0, (p - q) + (loss_q - loss_p), p - loss_p - eps)
    log_ratio = xp.log1p(xp.where(p > 0, excess / smooth_q, 0.0))
    total = sum_between(sums, 0, hist.shape[0], xp=xp)
    terms = xp.where(p > 0, (p - loss_p) / total * log_ratio, 0.0)
    return xp.maximum(terms.sum() + log_kept(window, total, xp=xp), 0.0)
