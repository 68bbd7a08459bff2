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
    nonzero_positions,
    power_of_two,
    running_sums,
)
from klquant._search.bin_by_bin import Search
from klquant._search.candidates import Group, Layout, all_windows
from klquant._search.chains import SERIES_LIMIT, TERMS, interior_chains
from klquant._search.prefix_sums import counts_between, filled_between, sum_up

P_TERMS = 10  # of the series in e_p: the rest is below 1.1e-17 of h
P_LIMIT = 1 / 32  # the largest e_p / h for which the series is used
WEIGHTLESS = 1e-25  # of the total: of smaller weights, only the first two terms of the series are added
SMALLEST = 1e-300  # of the total: h / unit of a smaller weight may underflow to 0


def prepare(hist: Array, num_quantized_bins: int, eps: Array, one_sided: bool, *, xp: ModuleType) -> Search:
    """Sum up the histogram and describe all candidates.

    A one-sided search folds the histogram to |x| first, and puts an empty bin in front as the first bin of each window.
    """
    levels = num_quantized_bins
    hist = hist.astype(xp.int64 if hist.dtype.kind in "iu" else xp.float64)  # narrow counts would wrap around
    if one_sided:
        centre, levels = hist.shape[0] // 2, num_quantized_bins // 2 + 1
        hist = xp.concatenate([xp.zeros(1, hist.dtype), hist[centre:] + _without_centre(hist[centre::-1], xp=xp)])
    layout = Layout(hist.shape[0], levels, one_sided, fixed_shapes(xp=xp))
    sums = sum_up(hist, layout.padding(), xp=xp)
    window = all_windows(sums, layout, eps, xp=xp)
    total = counts_between(sums, 0, layout.num_bins, xp=xp)
    filled = nonzero_positions(hist, sums.filled[: layout.num_bins], xp=xp)
    return Search(hist.astype(xp.float64), sums, window, total, layout, eps, filled)


def _without_centre(half: Array, *, xp: ModuleType) -> Array:
    return xp.concatenate([xp.zeros(1, half.dtype), half[1:]])


def closed_form_curve(search: Search, *, xp: ModuleType) -> tuple[Array, Array]:
    """Return the divergence of every smooth candidate, float64, +inf for all others; and which ones are coarse.

    `tiny` keeps the rounding of the self term small. Its running sums contain h^(1 - k) for all bins, also outside a
    window, and a difference of two sums loses what they have in common. Multiplied by e_p^k, a bin counts for
    h (e_p / h)^k, which is small if e_p <= h / 32 for all bins in the sums and not only for those of the window. So
    bins below `tiny` are left out of the sums, and windows that contain one are coarse.

    All logarithms are of counts / `unit`, the mean count of the non-empty bins. The unit cancels in self - cross.
    """
    window, total = search.window, search.total
    possible = (window.inside > 0) & (window.loss_p < 1) & (window.loss_q < 1)
    least = _smallest(search, xp=xp)
    anchor, shift = _anchors(search, possible, xp=xp)
    smooth = possible & (window.loss_p <= P_LIMIT * least) & (shift <= SERIES_LIMIT * (least - anchor))
    tiny = xp.where(smooth, window.loss_p, 0.0).max() / P_LIMIT
    tiny = xp.maximum(tiny, SMALLEST * total)
    smooth = smooth & (least >= tiny)
    coarse = possible & ~smooth

    unit = total / xp.maximum(search.sums.filled[-1], 1)
    terms = _chain_terms(search, smooth, anchor, shift, least, xp=xp)
    cross = _cross_term(search, smooth, anchor, shift, unit, terms, xp=xp)
    for end in (window.head, window.tail):
        cross = cross + _end_term(search, end, unit, xp=xp)
        smooth = smooth & ((end.sliced == 0) | (end.sliced > window.loss_q * end.support))
    curve = (_self_term(search, tiny, unit, xp=xp) - cross) / total
    return xp.where(smooth, xp.maximum(curve + window.log_kept, 0.0), xp.inf), coarse


def _smallest(search: Search, *, xp: ModuleType) -> Array:
    """Return a lower bound of the smallest non-zero P of each window: 1 for counts."""
    values, sums, window = search[:3]
    if sums.unit is None:
        return xp.ones(search.layout.candidates)
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
    """Return e, the smallest feasible e_q of the block (0 without one), and the shift d = e_q - e of each candidate."""
    loss = search.window.loss_q
    blocks = search.layout.blocks()
    counts = [block.candidates for block in blocks]
    smallest = xp.where(possible, loss, xp.inf)[search.layout.members()].min(axis=1)
    smallest = xp.where(xp.isfinite(smallest), smallest, 0.0)
    anchor = smallest[np.repeat(np.arange(len(blocks)), counts)]
    return anchor, xp.where(possible, loss - anchor, 0.0)


def _chain_terms(search: Search, smooth: Array, anchor: Array, shift: Array, least: Array, *, xp: ModuleType) -> int:
    """Return how many R_k are needed, so that the rest of the series is below 1e-16 of the counts if TERMS allow it.

    After R_K at most N x^(K + 1) (|e - e_p| + d) is left of a group, where x = d / (A/N - e) <= d / (`least` - e).
    """
    ratio = xp.where(smooth, shift / (least - anchor), 0.0).max()
    weight = xp.where(smooth, xp.abs(anchor - search.window.loss_p) + shift, 0.0).max() * search.sums.filled[-1]
    return at_most(TERMS, (weight * ratio ** xp.arange(1, TERMS + 1) > 1e-16 * search.total).sum(), xp=xp)


def _cross_term(
    search: Search, smooth: Array, anchor: Array, shift: Array, unit: Array, terms: int, *, xp: ModuleType
) -> Array:
    """Return sum_j (M_j - e_p N_j) log(q_j / unit) over the interior groups.

    It is the series in d of :mod:`klquant._search.chains`. The last step, k = terms + 1, has R_(k-1) but no R_k.
    """
    window, levels = search.window, search.layout.levels
    firsts = np.asarray([block.narrowest for block in search.layout.blocks()])
    needed = smooth[search.layout.members()].any(axis=1)
    chains = interior_chains(search, anchor[firsts], needed, unit, terms, xp=xp)
    inner = filled_between(search.sums, window.origin + window.size, window.origin + (levels - 1) * window.size)
    powers = [inner, *chains[2:], 0.0]
    cross = chains[0] - window.loss_p * chains[1]
    for k in range(1, terms + 2):
        cross = cross - shift**k / k * (powers[k - 1] + (anchor - window.loss_p) * powers[k])
    return cross


def _end_term(search: Search, end: Group, unit: Array, *, xp: ModuleType) -> Array:
    """Return (M - e_p N) log(q / unit) of the first or last group: A, N and M are known, so no series is needed."""
    window = search.window
    level = xp.where(end.sliced > 0, end.sliced / xp.maximum(end.support, 1) - window.loss_q, search.eps)
    term = (end.mass - window.loss_p * end.support) * xp.log(xp.where(level > 0, level, unit) / unit)
    return xp.where(end.support > 0, term, 0.0)


def _self_term(search: Search, tiny: Array, unit: Array, *, xp: ModuleType) -> Array:
    """Return sum (P - e) log((P - e) / unit) over the non-zero P, for windows without a bin below `tiny`.

    Between the two end bins P is the histogram h, and only e = e_p depends on the candidate::

        (h - e) log(h - e) = h log h - e (log h + 1) + sum_{k >= 2} e^k h^(1 - k) / (k (k - 1))

    So each power of e has a running sum over the bins, and a candidate takes one difference of each: O(1). The first
    term left out, k = 10, is h (e / h)^10 / 90 < 1e-17 h. NumPy takes fewer terms when all e / h are smaller (`ratio`).
    The two end bins hold outliers too, and are added directly. The powers of h are in units of a power of two near the
    mean count. They are left out for weights so small that they add nothing, and would leave the range of float64.
    """
    window, loss = search.window, search.window.loss_p
    filled = (search.values > 0) & (search.values >= tiny)
    counts = xp.where(filled, search.values, 1.0)
    log = xp.log(counts / unit)
    ratio, k = P_LIMIT * tiny / counts.min(), xp.arange(2, P_TERMS)
    terms = at_most(P_TERMS, 2 + (ratio**k / k**2 > 1e-17).sum(), xp=xp)
    scale = power_of_two(xp.clip(binary_exponent(unit, xp=xp), -900, 900), xp=xp)
    inverse = xp.where(counts > WEIGHTLESS * search.total, scale / counts, 0.0)
    powers = itertools.accumulate([inverse] * (terms - 2), operator.mul)
    coefficients = [counts / scale * log, -(log + 1.0)]
    coefficients += [power / (k * (k - 1)) for k, power in enumerate(powers, 2)]
    running = running_sums(xp.where(filled, xp.stack(coefficients), 0.0), xp=xp)
    between, scaled_loss = 0.0, loss / scale
    for within in (running[:, window.stop - 2] - running[:, window.start])[::-1]:
        between = between * scaled_loss + within
    return between * scale + _xlogx(window.first, loss, unit, xp=xp) + _xlogx(window.last, loss, unit, xp=xp)


def _xlogx(counts: Array, loss: Array, unit: Array, *, xp: ModuleType) -> Array:
    left = counts - loss
    return xp.where(left > 0, left * xp.log(xp.where(left > 0, left, unit) / unit), 0.0)
