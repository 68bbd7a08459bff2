"""The divergence of every candidate in closed form, once for NumPy and JAX.

With C = sum P, U = sum S, e_p and e_q what smoothing takes from a non-zero bin, and over each group j the sums
A_j of S, M_j of P and the number N_j of bins with P != 0::

    D = (1/C) [ sum_{k: P_k > 0} (P_k - e_p) log(P_k - e_p) - sum_j (M_j - e_p N_j) log(q_j) ] + log(U / C)
    q_j = A_j / N_j - e_q where A_j > 0, else eps

The first sum is expanded in e_p over running sums (below), the second is made of residue chains
(:mod:`klquant._search.chains`). Candidates for which an expansion would be too coarse, which have few non-zero bins or
tiny weights, are evaluated bin by bin (:mod:`klquant._search.bin_by_bin`).
"""

import functools
import itertools
import math
import operator
from types import ModuleType

import numpy as np

from klquant._namespace import Array, at_most, fixed_shapes, map_selected, nonzero_positions, running_sums
from klquant._search.bin_by_bin import Search, direct_divergence
from klquant._search.candidates import Group, Layout, all_windows, log_kept
from klquant._search.chains import SERIES_LIMIT, TERMS, interior_chains
from klquant._search.prefix_sums import counts_between, filled_between, sum_up

P_TERMS = 10  # with e_p / h up to P_LIMIT the first term left out is below 1e-16 of h
P_LIMIT = 1 / 32
SMALLEST = 1e-300  # of the total: the logarithm of less may be that of 0
SMALLEST_CLASS = 8  # bins: less is not worth the compilation
BLOCK_SIZE = 2**16  # entries of a temporary array where candidates are evaluated bin by bin


def prepare(hist: Array, num_quantized_bins: int, eps: float, one_sided: bool, *, xp: ModuleType) -> Search:
    """Sum up the histogram and describe all candidates."""
    levels = num_quantized_bins
    if one_sided:
        centre, levels = hist.shape[0] // 2, num_quantized_bins // 2 + 1
        hist = xp.concatenate([xp.zeros(1, hist.dtype), hist[centre:] + _without_centre(hist[centre::-1], xp=xp)])
    layout = Layout(hist.shape[0], levels, one_sided)
    sums = sum_up(hist, layout.padding(alone=not fixed_shapes(xp=xp)), xp=xp)
    window = all_windows(sums, layout, eps, xp=xp)
    total = counts_between(sums, 0, layout.num_bins, xp=xp)
    filled = nonzero_positions(hist, sums.filled[: layout.num_bins], xp=xp)
    return Search(hist.astype(xp.float64), sums, window, total, layout, eps, filled)


def _without_centre(half: Array, *, xp: ModuleType) -> Array:
    return xp.concatenate([xp.zeros(1, half.dtype), half[1:]])


def closed_form_curve(search: Search, *, xp: ModuleType) -> Array:
    """Return the divergence of every candidate, float64, +inf where it is infeasible."""
    window, total = search.window, search.total
    possible = (window.inside > 0) & (window.loss_p < 1) & (window.loss_q < 1)
    least = _smallest(search, xp=xp)
    anchor, rest = _anchors(search, possible, xp=xp)
    smooth = possible & (window.loss_p <= P_LIMIT * least) & (rest <= SERIES_LIMIT * (least - anchor))
    tiny = xp.where(smooth, window.loss_p, 0.0).max() / P_LIMIT  # smaller weights would swamp the sums of powers
    tiny = xp.maximum(tiny, SMALLEST * total)
    smooth = smooth & (least >= tiny)
    coarse = possible & ~smooth

    unit = total / xp.maximum(search.sums.filled[-1], 1)  # logarithms are taken of counts / unit, to keep them small
    terms = _chain_terms(search, smooth, anchor, rest, least, xp=xp)
    cross = _cross_term(search, smooth, anchor, rest, unit, terms, xp=xp)
    for end in (window.head, window.tail):
        cross = cross + _end_term(search, end, unit, xp=xp)
        smooth = smooth & ((end.sliced == 0) | (end.sliced > window.loss_q * end.support))
    curve = (_self_term(search, tiny, unit, xp=xp) - cross) / total
    curve = xp.where(smooth, xp.maximum(curve + log_kept(window, total, xp=xp), 0.0), xp.inf)
    return _evaluate_coarse(curve, search, coarse, xp=xp)


def _smallest(search: Search, *, xp: ModuleType) -> Array:
    """Return (a lower bound of) the smallest non-zero P of each window."""
    values, sums, window = search[:3]
    if sums.unit is None:
        return xp.ones(window.start.shape)
    present = xp.where(values > 0, values, xp.inf)
    if search.layout.one_sided:
        inner = xp.minimum.accumulate(present)[window.stop - 2]
    else:
        centre = values.shape[0] // 2
        by_distance = xp.minimum(present[centre::-1], present[centre:])
        inner = xp.minimum.accumulate(by_distance)[window.stop - 2 - centre]
    ends = (xp.where(end > 0, end, xp.inf) for end in (window.first, window.last))
    return xp.minimum(inner, xp.minimum(*ends))


def _anchors(search: Search, possible: Array, *, xp: ModuleType) -> tuple[Array, Array]:
    """Split e_q into the smallest in its block (0 where there is none) and the rest."""
    loss = search.window.loss_q
    blocks = search.layout.blocks()
    counts = [block.candidates for block in blocks]
    members = np.asarray([block.narrowest for block in blocks])[:, None] + np.arange(max(counts))
    members = np.minimum(members, len(loss) - 1)  # a shorter block borrows from its neighbour: that does no harm
    smallest = xp.where(possible, loss, xp.inf)[members].min(axis=1)
    smallest = xp.where(xp.isfinite(smallest), smallest, 0.0)
    anchor = smallest[np.repeat(np.arange(len(blocks)), counts)]
    return anchor, xp.where(possible, loss - anchor, 0.0)


def _chain_terms(search: Search, smooth: Array, anchor: Array, rest: Array, least: Array, *, xp: ModuleType) -> int:
    """Return how many R_k are needed: what is left out is below 1e-16 of the counts."""
    ratio = xp.where(smooth, rest / (least - anchor), 0.0).max()
    weight = xp.where(smooth, xp.abs(anchor - search.window.loss_p) + rest, 0.0).max() * search.sums.filled[-1]
    return at_most(TERMS, (weight * ratio ** xp.arange(1, TERMS + 1) > 1e-16 * search.total).sum(), xp=xp)


def _cross_term(
    search: Search, smooth: Array, anchor: Array, rest: Array, unit: Array, terms: int, *, xp: ModuleType
) -> Array:
    """Return sum_j (M_j - e_p N_j) log(q_j / unit) over all groups but the first and last."""
    window, levels = search.window, search.layout.levels
    firsts = np.asarray([block.narrowest for block in search.layout.blocks()])
    needed = xp.add.reduceat(smooth.astype(xp.int64), firsts) > 0
    chains = interior_chains(search, anchor[firsts], needed, unit, terms, xp=xp)
    inner = filled_between(search.sums, window.origin + window.size, window.origin + (levels - 1) * window.size)
    powers = [inner, *chains[2:], 0.0]
    cross = chains[0] - window.loss_p * chains[1]
    for k in range(1, terms + 2):
        cross = cross - rest**k / k * (powers[k - 1] + (anchor - window.loss_p) * powers[k])
    return cross


def _end_term(search: Search, end: Group, unit: Array, *, xp: ModuleType) -> Array:
    """Return (M - e_p N) log(q / unit) of the first or last group."""
    window = search.window
    level = xp.where(end.sliced > 0, end.sliced / xp.maximum(end.support, 1) - window.loss_q, search.eps)
    term = (end.mass - window.loss_p * end.support) * xp.log(xp.where(level > 0, level, unit) / unit)
    return xp.where(end.support > 0, term, 0.0)


def _self_term(search: Search, tiny: Array, unit: Array, *, xp: ModuleType) -> Array:
    """Return sum (P - e) log((P - e) / unit) over the non-zero P, for windows without a `tiny` one.

    Between the ends (h - e) log(h - e) = h log h - e (log h + 1) + sum_k e^k h^(1 - k) / (k (k - 1)) over running sums.
    """
    window, loss = search.window, search.window.loss_p
    filled = (search.values > 0) & (search.values >= tiny)
    counts = xp.where(filled, search.values, 1.0)
    log = xp.log(counts / unit)
    ratio, k = P_LIMIT * tiny / counts.min(), xp.arange(2, P_TERMS)
    terms = at_most(P_TERMS, 2 + (ratio**k / k**2 > 1e-17).sum(), xp=xp)
    powers = itertools.accumulate([1.0 / counts] * (terms - 2), operator.mul)
    coefficients = [counts * log, -(log + 1.0)] + [power / (k * (k - 1)) for k, power in enumerate(powers, 2)]
    columns = tuple(xp.where(filled, coefficient, 0.0) for coefficient in coefficients)
    between = 0.0
    for running in reversed(running_sums(columns, xp=xp)):
        between = between * loss + (running[window.stop - 2] - running[window.start])
    return between + _xlogx(window.first, loss, unit, xp=xp) + _xlogx(window.last, loss, unit, xp=xp)


def _xlogx(counts: Array, loss: Array, unit: Array, *, xp: ModuleType) -> Array:
    left = counts - loss
    return xp.where(left > 0, left * xp.log(xp.where(left > 0, left, unit) / unit), 0.0)


def _evaluate_coarse(curve: Array, search: Search, coarse: Array, *, xp: ModuleType) -> Array:
    """Evaluate the `coarse` candidates bin by bin, in classes by the number of bins: it is the room each takes."""
    values, sums, window = search[:3]
    filled = xp.where(coarse, filled_between(sums, window.start + 1, window.stop - 1), 0)
    # counts are at least 1, so only a loss above SERIES_LIMIT makes a candidate coarse; and r = eps z / loss
    bound = (
        values.shape[0] if sums.unit is not None else math.ceil(values.shape[0] * search.eps / (0.99 * SERIES_LIMIT))
    )
    most = min(bound, values.shape[0])
    parts = (part for part in (most // 16, most // 4) if part >= SMALLEST_CLASS)
    for low, high in itertools.pairwise((-1, *parts, most)):
        selected = coarse & (filled > low) & (filled <= high)
        room = at_most(high, xp.where(selected, filled, 0).max(), xp=xp)
        evaluate = functools.partial(direct_divergence, search, room=room, xp=xp)
        curve = xp.where(selected, map_selected(evaluate, selected, BLOCK_SIZE // (room + 1) + 1, xp=xp), curve)
    return curve
