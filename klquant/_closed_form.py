"""The divergence of every candidate in closed form, once for NumPy and JAX.

With prefix sums over the bins every candidate needs only the totals of its groups, because the quantized
distribution is constant on the non-zero bins of a group: O(candidates x levels) in place of the
O(candidates x bins) of the loops in :mod:`klquant.reference`, with which this shares no code.

With C = sum P, U = sum S, e_p and e_q what smoothing takes from a non-zero bin, and over each group j the sums
A_j of S, M_j of P and the number N_j of bins with P != 0::

    D = (1/C) [ sum_{k: P_k > 0} (P_k - e_p) log(P_k - e_p) - sum_j (M_j - e_p N_j) log(q_j) ] + log(U / C)
    q_j = A_j / N_j - e_q where A_j > 0, else eps
"""

import math
from types import ModuleType
from typing import NamedTuple

from klquant._namespace import Array, map_blocks
from klquant.divergence import smoothing_loss
from klquant.merging import merge_bounds, prefix_sums, sum_between

_SERIES_TERMS = 9  # with e/h <= 1/32 the first term left out is below 1e-16 of h
_SERIES_LIMIT = 1 / 32
_BLOCK_SIZE = 2**19  # entries of a temporary array in the direct sum


class Windows(NamedTuple):
    """All candidates at once: arrays over the candidates, counts as float64."""

    start: Array
    stop: Array
    first: Array  # P[0]
    last: Array  # P[w - 1]
    beyond: Array  # what `last` holds of the right outliers
    inside: Array  # sum of S


def closed_form_curve(hist: Array, num_quantized_bins: int, eps: float, *, xp: ModuleType) -> Array:
    """Return the divergence of every candidate, float64, +inf where it is infeasible."""
    sums = prefix_sums(hist, xp=xp)
    nonzeros = prefix_sums(hist > 0, xp=xp)
    window = windows(sums, hist.shape[0], num_quantized_bins, xp=xp)
    values = hist.astype(xp.float64)
    unit = values.sum() / xp.maximum((hist > 0).sum(), 1)  # logs are taken of counts / unit, to keep them small

    sliced, support, mass = _groups(hist, sums, nonzeros, window, num_quantized_bins, xp=xp)
    width = window.stop - window.start
    loss_p = smoothing_loss(support.sum(axis=1), width, eps, xp=xp)
    loss_q = smoothing_loss(xp.where(sliced > 0, support, 0).sum(axis=1), width, eps, xp=xp)
    level = xp.where(sliced > 0, sliced / xp.maximum(support, 1) - loss_q[:, None], eps)
    cross = (mass - loss_p[:, None] * support) * xp.log(level / unit)

    total = sum_between(sums, 0, hist.shape[0], xp=xp)
    # with counts the series fails only where less than one bin in `_SERIES_LIMIT / eps` is filled
    room = hist.shape[0] if hist.dtype.kind == "f" else math.ceil(hist.shape[0] * eps / _SERIES_LIMIT) + 1
    self_term = _self_term(values, nonzeros, window, loss_p, unit, room=min(room, hist.shape[0]), xp=xp)
    curve = (self_term - xp.where(support > 0, cross, 0.0).sum(axis=1)) / total + log_kept(window, total, xp=xp)
    feasible = (loss_p < 1) & (loss_q < 1) & (level > 0).all(axis=1) & (_smallest(values, window, xp=xp) > loss_p)
    return xp.where(feasible, xp.maximum(curve, 0.0), xp.inf)


def windows(sums: tuple[Array, Array], num_bins: int, num_quantized_bins: int, *, xp: ModuleType) -> Windows:
    """Return the windows of all candidates, from the narrowest to the widest."""
    centre = num_bins // 2
    half = xp.arange(num_quantized_bins // 2, centre + 1)
    start, stop = centre - half, centre + half + 1
    return Windows(
        start,
        stop,
        first=sum_between(sums, 0, start + 1, xp=xp),
        last=sum_between(sums, stop - 1, num_bins, xp=xp),
        beyond=sum_between(sums, stop, num_bins, xp=xp),
        inside=sum_between(sums, start + 1, stop, xp=xp),
    )


def log_kept(window: Windows, total: Array, *, xp: ModuleType) -> Array:
    """Return log(sum S / sum P): S lacks the first bin and all outliers."""
    lost = window.first + window.beyond  # exact where it is small, as `inside` is where that is
    return xp.where(lost < window.inside, xp.log1p(-lost / total), xp.log(window.inside / total))


def _groups(
    hist: Array,
    sums: tuple[Array, Array],
    nonzeros: tuple[Array, Array],
    window: Windows,
    num_quantized_bins: int,
    *,
    xp: ModuleType,
) -> tuple[Array, Array, Array]:
    """Return S summed, the bins with P != 0, and P summed, over each group: shape (candidates, levels)."""
    bounds = window.start[:, None] + merge_bounds(window.stop - window.start, num_quantized_bins, xp=xp)
    low = xp.concatenate([window.start[:, None] + 1, bounds[:, 1:-1]], axis=1)  # S[0] = 0
    filled = sum_between(nonzeros, low, bounds[:, 1:], xp=xp)
    sliced = xp.where(filled > 0, sum_between(sums, low, bounds[:, 1:], xp=xp), 0.0)

    group = xp.arange(num_quantized_bins)
    is_first, is_last = group == 0, group == num_quantized_bins - 1
    only_beyond = (window.last > 0) & (hist[window.stop - 1] == 0)
    support = filled + is_first * (window.first > 0)[:, None] + is_last * only_beyond[:, None]
    mass = sliced + is_first * window.first[:, None] + is_last * window.beyond[:, None]
    return sliced, support, mass


def _self_term(
    values: Array,
    nonzeros: tuple[Array, Array],
    window: Windows,
    loss: Array,
    unit: Array,
    *,
    room: int,
    xp: ModuleType,
) -> Array:
    """Return the sum of (P - loss) log((P - loss) / unit) over the non-zero bins of each window."""
    smallest = xp.where(values > 0, values, xp.inf).min()
    direct = loss > _SERIES_LIMIT * smallest
    one_by_one = _direct_sums(values, nonzeros, window, loss, unit, needed=direct, room=room, xp=xp)
    inner = xp.where(direct, one_by_one, _series_sums(values, window, loss, unit, xp=xp))
    return inner + _xlogx(window.first, loss, unit, xp=xp) + _xlogx(window.last, loss, unit, xp=xp)


def _xlogx(counts: Array, loss: Array, unit: Array, *, xp: ModuleType) -> Array:
    left = counts - loss
    return xp.where(left > 0, left * xp.log(xp.where(left > 0, left, 1.0) / unit), 0.0)


def _series_sums(values: Array, window: Windows, loss: Array, unit: Array, *, xp: ModuleType) -> Array:
    """Expand (h - e) log(h - e) = h log h - e (log h + 1) + sum_k e^k h^(1-k) / (k (k-1)) over prefix sums."""
    filled = values > 0
    safe = xp.where(filled, values, 1.0)
    log = xp.log(safe / unit)
    terms = [safe * log, -(log + 1)] + [safe ** (1 - k) / (k * (k - 1)) for k in range(2, _SERIES_TERMS)]
    total = xp.zeros(loss.shape, xp.float64)
    for power, term in enumerate(terms):
        running = xp.cumsum(xp.where(filled, term, 0.0))
        total = total + loss**power * (running[window.stop - 2] - running[window.start])
    return total


def _direct_sums(
    values: Array,
    nonzeros: tuple[Array, Array],
    window: Windows,
    loss: Array,
    unit: Array,
    *,
    needed: Array,
    room: int,
    xp: ModuleType,
) -> Array:
    """Sum over at most `room` non-zero bins one by one, for candidates that have few of them or tiny weights."""
    rank, num_bins, num_candidates = nonzeros[0], values.shape[0], loss.shape[0]
    kth_nonzero = xp.searchsorted(rank[:-1], xp.arange(1, num_bins + 1)) - 1  # positions of the non-zero bins
    rows = max(1, _BLOCK_SIZE // room)
    candidates = xp.arange(-(-num_candidates // rows) * rows).reshape(-1, rows) % num_candidates

    def block(k: Array) -> Array:
        position = rank[window.start[k] + 1][:, None] + xp.arange(room)
        inside = position < rank[window.stop[k] - 1][:, None]
        counts = values[kth_nonzero[xp.minimum(position, num_bins - 1)]]
        return xp.where(inside, _xlogx(counts, loss[k][:, None], unit, xp=xp), 0.0).sum(axis=1)

    return map_blocks(block, candidates, needed[candidates].any(axis=1), xp=xp).reshape(-1)[:num_candidates]


def _smallest(values: Array, window: Windows, *, xp: ModuleType) -> Array:
    """Return the smallest non-zero P of each window."""
    centre = values.shape[0] // 2
    present = xp.where(values > 0, values, xp.inf)
    pairs = xp.minimum(present[centre::-1], present[centre:])  # by distance from the centre
    inner = xp.minimum.accumulate(pairs)[(window.stop - 2) - centre]
    ends = [xp.where(end > 0, end, xp.inf) for end in (window.first, window.last)]
    return xp.minimum(inner, xp.minimum(*ends))
