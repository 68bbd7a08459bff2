"""The divergence of chosen candidates, bin by bin over the non-zero bins of their windows.

A sum of p log(p / q) whose ratios are taken as 1 + (p - q) / q: where P and Q are close it is good to its own
rounding, and where they are equal it is exactly 0. So it also tells near-ties of the closed form apart.
"""

from types import ModuleType
from typing import NamedTuple

from klquant._namespace import Array
from klquant._search.candidates import Group, Layout, Windows, log_kept
from klquant._search.prefix_sums import Sums, counts_between, filled_between


class Search(NamedTuple):
    """A histogram prepared for the search."""

    values: Array
    """The counts, float64."""
    sums: Sums
    window: Windows
    total: Array
    """C, the sum of all counts."""
    layout: Layout
    eps: float
    filled: Array
    """Where the bins are that are not empty, in order."""


def direct_divergence(search: Search, candidates: Array, room: int, *, xp: ModuleType) -> Array:
    """Return the divergence of some candidates, shape (candidates,); +inf where infeasible.

    `room` bounds the non-zero bins between the ends of each of these windows.
    """
    values, sums, window, total, _, eps, filled = search
    chosen = _columns(window, candidates)
    rank = sums.filled[chosen.start + 1] + xp.arange(room)
    inside = rank < sums.filled[chosen.stop - 1]
    position = xp.where(inside, filled[xp.minimum(rank, filled.shape[0] - 1)], chosen.start)
    p = xp.concatenate([xp.where(inside, values[position], 0.0), chosen.first, chosen.last], axis=1)
    q = xp.concatenate([_level(search, chosen, position, xp=xp), _mean(chosen.head), _mean(chosen.tail)], axis=1)

    left_p, left_q = p - chosen.loss_p, xp.where(q > 0, q - chosen.loss_q, eps)
    excess = xp.where(q > 0, (p - q) + (chosen.loss_q - chosen.loss_p), left_p - eps)
    feasible = (chosen.loss_p < 1) & (chosen.loss_q < 1) & ((p == 0) | ((left_p > 0) & (left_q > 0)))
    ratio = excess / left_q  # rounds to -1 where smoothing left next to nothing of p
    log_ratio = xp.where(ratio < -0.5, xp.log(left_p / left_q), xp.log1p(ratio))
    share = left_p / total
    terms = xp.where((share > 0) & feasible, share * log_ratio, 0.0)
    divergence = terms.sum(axis=1) + log_kept(chosen, total, xp=xp)[:, 0]
    return xp.where(feasible.all(axis=1), xp.maximum(divergence, 0.0), xp.inf)


def _columns(window: Windows, candidates: Array) -> Windows:
    """Return the chosen candidates, each field of shape (candidates, 1)."""
    *fields, head, tail = window
    groups = (Group(*(field[candidates][:, None] for field in group)) for group in (head, tail))
    return Windows(*(field[candidates][:, None] for field in fields), *groups)


def _mean(group: Group) -> Array:
    """Return Q of the group's bins, 0 where it holds nothing."""
    return group.sliced / (group.support + (group.support == 0))


def _level(search: Search, window: Windows, position: Array, *, xp: ModuleType) -> Array:
    """Return Q at these non-empty bins between the ends."""
    last = search.layout.levels - 1
    group = xp.minimum((position - window.origin) // window.size, last)
    low = window.origin + group * window.size
    high = low + window.size
    level = counts_between(search.sums, low, high, xp=xp) / xp.maximum(filled_between(search.sums, low, high), 1)
    return xp.where(group == 0, _mean(window.head), xp.where(group == last, _mean(window.tail), level))
