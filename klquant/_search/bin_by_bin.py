"""The divergence of chosen candidates, summed bin by bin over the non-empty bins of their windows.

This is sum p log(p / q) itself, without a series. It costs a term for each non-empty bin, so the search uses it only
for the candidates that the closed form leaves out, and to decide between near-ties.

The logarithm is taken of 1 + (p - q) / q, with log1p where the ratio is small. So a term is off by a few roundings of
p times 1 + |log(p / q)|, however large C is, and D by about 1e-16 where it is small. Where P and Q are equal, D is
exactly 0. The closed form cannot do that, for it subtracts two sums that are far larger than D.
"""

from types import ModuleType
from typing import NamedTuple

from klquant._namespace import Array
from klquant._search.candidates import Group, Layout, Windows, log_kept
from klquant._search.prefix_sums import Sums, counts_between, filled_between


class Search(NamedTuple):
    """A histogram prepared for the search."""

    values: Array
    """The counts in float64."""
    sums: Sums
    window: Windows
    total: Array
    """C, the sum of the counts."""
    layout: Layout
    eps: Array
    filled: Array
    """The positions of the non-empty bins, in order."""
    most_eps: float
    """An upper bound of eps, which may be traced."""


def direct_divergence(search: Search, candidates: Array, room: int, *, xp: ModuleType) -> Array:
    """Return the divergence of these candidates, shape (candidates,); +inf where infeasible.

    `room` is an upper bound for the number of non-empty bins between the two end bins of each window. Row by row, the
    terms are those bins, then P[0], then P[w - 1]. Empty bins need no term: they add their share of log(U / C) only.
    """
    values, sums, window, total, _, eps, filled, _ = search
    chosen = _columns(window, candidates)
    rank = sums.filled[chosen.start + 1] + xp.arange(room)
    inside = rank < sums.filled[chosen.stop - 1]
    position = xp.where(inside, filled[xp.minimum(rank, filled.shape[0] - 1)], chosen.start)
    p = xp.concatenate([xp.where(inside, values[position], 0.0), chosen.first, chosen.last], axis=1)
    q = xp.concatenate([_level(search, chosen, position, xp=xp), _mean(chosen.head), _mean(chosen.tail)], axis=1)

    left_p, left_q = p - chosen.loss_p, xp.where(q > 0, q - chosen.loss_q, eps)
    excess = xp.where(q > 0, (p - q) + (chosen.loss_q - chosen.loss_p), left_p - eps)
    feasible = (chosen.loss_p < 1) & (chosen.loss_q < 1) & ((p == 0) | ((left_p > 0) & (left_q > 0)))
    ratio = excess / left_q  # rounds to -1 where smoothing leaves almost nothing of p
    log_ratio = xp.where(ratio < -0.5, xp.log(left_p / left_q), xp.log1p(ratio))
    share = left_p / total
    terms = xp.where((share > 0) & feasible, share * log_ratio, 0.0)
    divergence = terms.sum(axis=1) + log_kept(chosen, total, xp=xp)[:, 0]
    return xp.where(feasible.all(axis=1), xp.maximum(divergence, 0.0), xp.inf)


def _columns(window: Windows, candidates: Array) -> Windows:
    """Return the windows of these candidates, each field of shape (candidates, 1)."""
    *fields, head, tail = window
    groups = (Group(*(field[candidates][:, None] for field in group)) for group in (head, tail))
    return Windows(*(field[candidates][:, None] for field in fields), *groups)


def _mean(group: Group) -> Array:
    """Return Q in the bins of the group before smoothing, 0 if the group is empty."""
    return group.sliced / (group.support + (group.support == 0))


def _level(search: Search, window: Windows, position: Array, *, xp: ModuleType) -> Array:
    """Return Q in these non-empty bins between the two end bins, before smoothing."""
    last = search.layout.levels - 1
    group = xp.minimum((position - window.origin) // window.size, last)
    low = window.origin + group * window.size
    high = low + window.size
    level = counts_between(search.sums, low, high, xp=xp) / xp.maximum(filled_between(search.sums, low, high), 1)
    return xp.where(group == 0, _mean(window.head), xp.where(group == last, _mean(window.tail), level))
