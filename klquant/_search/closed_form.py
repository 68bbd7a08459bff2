"""The divergence curve: D of every candidate, once for NumPy and JAX.

:mod:`klquant._search` has the formula, its symbols and the error budget::

    D = (1/C) [ self - cross ] + log(U / C)
    self  = sum_{k: P_k > 0} (P_k - e_p) log(P_k - e_p)     a series in e_p over running sums: `_self_term`
    cross = sum_j (M_j - e_p N_j) log(q_j)                  the interior groups: `_cross_term`, by residue chains
                                                            the first and last group: `_end_term`, directly

Both series need e_p and d (the part of e_q that differs within a block) to be small beside every non-empty bin. That
fails for windows with few non-empty bins, from which smoothing takes much, and for tiny weights. Such candidates are
called coarse here, and are summed bin by bin (:mod:`klquant._search.bin_by_bin`). All others are called smooth.
"""

import itertools
import operator
from types import ModuleType

import numpy as np

from klquant._namespace import (
    Array,
    at_most,
    binary_exponent,
    fixed_shapes,
    least,
    most,
    power_of_two,
    running_sums,
    stack_rows,
)
from klquant._search.bin_by_bin import Search
from klquant._search.candidates import Layout, all_windows
from klquant._search.chains import SERIES_LIMIT, TERMS, interior_chains
from klquant._search.prefix_sums import counted, fold, scaled, sum_up

P_TERMS = 10  # of the series in e_p: the rest is below 1.1e-17 of h
P_LIMIT = 1 / 32  # the largest e_p / h for which the series is used
WEIGHTLESS = 1e-25  # of the total: of smaller weights, only the first two terms of the series are added
SMALLEST, LARGEST = 2.0**-1022, 2.0**1000  # of what is not 0, and of eps, in the unit of the search


def prepare(hist: Array, num_quantized_bins: int, eps: Array, one_sided: bool, *, xp: ModuleType) -> Search:
    """Sum up the histogram and describe all candidates.

    A one-sided search folds the histogram to |x| first, and puts an empty bin in front as the first bin of each window.
    All counts are divided by the power of two at or below the mean count of the non-empty bins.
    """
    levels = num_quantized_bins
    hist = hist.astype(xp.int64 if hist.dtype.kind in "iu" else xp.float64)  # narrow counts would wrap around
    if one_sided:
        levels = num_quantized_bins // 2 + 1
        hist = xp.concatenate([xp.zeros(1, hist.dtype), fold(hist, xp=xp)])
    layout = Layout(hist.shape[0], levels, one_sided, fixed_shapes(xp=xp))
    sums = sum_up(hist, layout.padding(), xp=xp)
    total, filled = counted(sums, sums.table[:, -1])
    one = power_of_two(1 - binary_exponent(total / xp.maximum(filled, 1), xp=xp), xp=xp)
    sums, total = scaled(sums, one, xp=xp), total * one
    eps = xp.where((eps > 0) & (eps < xp.inf), xp.clip(eps * one, SMALLEST, LARGEST), xp.nan)
    values = hist.astype(xp.float64) * one
    if len(sums.table) > 2:
        values = xp.where(hist > 0, xp.maximum(values, SMALLEST), 0.0)
    window = all_windows(sums, layout, total, eps, xp=xp)
    return Search(values, sums, window, total, one, layout, eps)


def closed_form_curve(search: Search, *, xp: ModuleType) -> tuple[Array, Array]:
    """Return the divergence of every smooth candidate, float64, +inf for all others; and which ones are coarse.

    All counts are in units of `one`, so that the logarithms are small. Their weights add up to the same in self and
    cross, so the unit cancels in the difference.
    """
    window, total = search.window, search.total
    possible = (window.inside > 0) & (window.loss_p < search.one) & (window.loss_q < search.one)
    smallest = _smallest(search, xp=xp)
    lowest, anchor, shift = _anchors(search, possible, xp=xp)
    smooth = possible & (window.loss_p <= P_LIMIT * smallest) & (shift <= SERIES_LIMIT * (smallest - anchor))
    coarse = possible & ~smooth

    terms = _chain_terms(search, smooth, anchor, shift, smallest, xp=xp)
    needed = most(smooth.astype(xp.float64)[search.layout.members()], axis=1, xp=xp) > 0
    chains = interior_chains(search, lowest, needed, terms, xp=xp)
    cross = _cross_term(search, chains, anchor, shift) + _end_terms(search, xp=xp)
    for end in (window.head, window.tail):
        smooth = smooth & ((end.sliced == 0) | (end.sliced > window.loss_q * end.support))
    curve = (_self_term(search, xp.where(smooth, window.loss_p / smallest, 0.0), xp=xp) - cross) / total
    return xp.where(smooth, xp.maximum(curve + window.log_kept, 0.0), xp.inf), coarse


def _smallest(search: Search, *, xp: ModuleType) -> Array:
    """Return a lower bound of the smallest non-zero P of each window: 1 for counts."""
    weights, candidates = search.values, search.layout.candidates
    if len(search.sums.table) == 2:
        return search.one
    present = xp.where(weights > 0, weights, xp.inf)
    if not search.layout.one_sided:
        centre = weights.shape[0] // 2
        present = xp.minimum(present[centre::-1], present[centre:])
    inner = xp.minimum.accumulate(present)[-candidates - 1 : -1]
    ends = (xp.where(end > 0, end, xp.inf) for end in (search.window.first, search.window.last))
    return xp.minimum(inner, xp.minimum(*ends))


def _anchors(search: Search, possible: Array, *, xp: ModuleType) -> tuple[Array, Array, Array]:
    """Return e, the smallest feasible e_q of each block (0 without one); and for each candidate e and d = e_q - e."""
    loss, layout = search.window.loss_q, search.layout
    smallest = least(xp.where(possible, loss, xp.inf)[layout.members()], axis=1, xp=xp)
    smallest = xp.where(smallest < xp.inf, smallest, 0.0)
    anchor = smallest[layout.block_of()]
    return smallest, anchor, xp.where(possible, loss - anchor, 0.0)


def _chain_terms(search: Search, smooth: Array, anchor: Array, shift: Array, smallest: Array, *, xp: ModuleType) -> int:
    """Return how many R_k are needed, so that the rest of the series is below 1e-16 of the counts if TERMS allow it.

    After R_K at most N x^(K + 1) (|e - e_p| + d) is left of a group, where x = d / (A/N - e) <= d / (`smallest` - e).
    """

    def terms() -> Array:
        ratio = xp.where(smooth, shift / (smallest - anchor), 0.0).max()
        weight = xp.where(smooth, xp.abs(anchor - search.window.loss_p) + shift, 0.0).max() * search.sums.filled[-1]
        return (weight * ratio ** xp.arange(1, TERMS + 1) > 1e-16 * search.total).sum()

    return at_most(TERMS, terms, xp=xp)


def _cross_term(search: Search, chains: Array, anchor: Array, shift: Array) -> Array:
    """Return sum_j (M_j - e_p N_j) log(q_j) over the interior groups.

    It is the series in d of :mod:`klquant._search.chains`. The last step, after R_1 .. R_terms, has no R_k.
    """
    window = search.window
    cross, powers = chains[0] - window.loss_p * chains[1], [window.interior, *chains[2:]]
    power, rest = shift, anchor - window.loss_p
    for k in range(1, len(powers)):
        cross = cross - power / k * (powers[k - 1] + rest * powers[k])
        power = power * shift
    return cross - power / len(powers) * powers[-1]


def _end_terms(search: Search, *, xp: ModuleType) -> Array:
    """Return (M - e_p N) log(q) of the first and the last group: A, N and M are known, so no series is needed."""
    window = search.window
    cross = 0.0
    for end in (window.head, window.tail):
        level = xp.where(end.sliced > 0, end.sliced / xp.maximum(end.support, 1) - window.loss_q, search.eps)
        cross = cross + (end.mass - window.loss_p * end.support) * xp.log(xp.maximum(level, SMALLEST))
    return cross


def _self_term(search: Search, ratio: Array, *, xp: ModuleType) -> Array:
    """Return sum (P - e) log(P - e) over the non-zero P. `ratio` is e / h of the smallest bin of each smooth window.

    Between the two end bins P is the histogram h, and only e = e_p depends on the candidate::

        (h - e) log(h - e) = h log h - e (log h + 1) + sum_{k >= 2} e^k h^(1 - k) / (k (k - 1))

    So each power of e has a running sum over the bins from the centre outwards; a candidate takes one entry of each,
    O(1). The first term left out, k = 10, is h (e / h)^10 / 90 < 1e-17 h, as e / h <= 1 / 32 for all bins of a smooth
    window. NumPy takes fewer terms where `ratio` is smaller. The two end bins hold outliers, and are added directly.
    Powers of h are left out for weights so small that they add nothing, and would leave the range of float64.
    """
    layout, loss = search.layout, search.window.loss_p
    filled = search.values > 0
    counts = xp.where(filled, search.values, 1.0)
    log = xp.log(counts)
    k = np.arange(2, P_TERMS)
    terms = at_most(P_TERMS, lambda: 2 + (ratio.max() ** k / k**2 > 1e-17).sum(), xp=xp)
    inverse = xp.where(filled & (counts > WEIGHTLESS * search.total), 1 / counts, 0.0)
    powers = itertools.accumulate([inverse] * (terms - 2), operator.mul)
    coefficients = [counts * log, -(log + filled), *(power / (k * (k - 1)) for k, power in enumerate(powers, 2))]
    table = stack_rows(coefficients, xp=xp)  # 0 for an empty bin, as log(1) is
    outwards = table if layout.one_sided else fold(table, xp=xp)
    between = 0.0
    for within in running_sums(outwards, xp=xp)[::-1, -layout.candidates - 1 : -1]:
        between = between * loss + within
    for counts in (search.window.first, search.window.last):
        left = xp.maximum(counts - loss, 0.0)
        between = between + left * xp.log(xp.maximum(left, SMALLEST))
    return between
