"""The divergence of chosen candidates, summed bin by bin over the non-empty bins of their windows.

This is sum p log(p / q) itself, without a series. It costs a term for each non-empty bin, so the search uses it only
for the candidates that the closed form leaves out, and to decide between near-ties.

The logarithm is taken of 1 + (p - q) / q, with log1p where the ratio is small. So a term is off by a few roundings of
p times 1 + |log(p / q)|, however large C is, and D by about 1e-16 where it is small. Where P and Q are equal, D is
exactly 0. The closed form cannot do that, for it subtracts two sums that are far larger than D.
"""

import sys
from types import ModuleType
from typing import NamedTuple

from klquant._namespace import (
    Array,
    first_and_number,
    least,
    nonzero_positions,
    repeat,
    stack_rows,
    sum_selected,
    where_needed,
)
from klquant._search.candidates import Layout, Windows
from klquant._search.prefix_sums import Sums, between

NEAR = 1e-12  # nats: well above the error of the closed form (`klquant._search` has its budget)
ROOM = 2**13  # entries of the temporary arrays, which then stay in the cache


class Search(NamedTuple):
    """A histogram prepared for the search."""

    values: Array
    """The counts in float64."""
    sums: Sums
    window: Windows
    total: Array
    """C, the sum of the counts."""
    one: Array
    """The count 1, in the unit of all counts and of eps: a power of two near the mean count of the non-empty bins."""
    layout: Layout
    eps: Array


class Chosen(NamedTuple):
    """The windows of some candidates: arrays of shape (candidates, 1)."""

    origin: Array
    size: Array
    before: Array
    """Number of non-empty bins up to the first bin, with it."""
    bins: Array
    """Number of non-empty bins between the two end bins."""
    loss_p: Array
    loss_q: Array
    first: Array
    last: Array
    head: Array
    """Q in the first group before smoothing, 0 if the group is empty."""
    tail: Array
    """The same of the last group."""


def settled_curve(curve: Array, search: Search, coarse: Array, *, ties: bool, xp: ModuleType) -> Array:
    """Return the curve with the `coarse` candidates bin by bin, and then with all that are near the minimum, if `ties`.

    The first of these comes alone: if its divergence is 0, no other can be better. All is one loop, because its body is
    much code for a compiler.
    """

    def settle(turn: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        curve, selected, settled = state

        def compute() -> Array:
            return xp.where(selected, _divergences(search, selected, xp=xp), curve)

        _, number = first_and_number(selected, xp=xp)
        curve = where_needed(number > 0, compute, lambda: curve, xp=xp)
        settled = settled | selected
        near = near_minimum(curve, NEAR, xp=xp)
        first, number = first_and_number(near, xp=xp)
        first = xp.minimum(first, last)
        wanted = (xp.arange(last + 1) == first) | ((turn > 0) & ~(settled[first] & (curve[first] == 0)))
        return curve, near & ~settled & wanted & (number > 1), settled

    last = curve.shape[0] - 1
    return repeat(settle, 3 if ties else 1, (curve, coarse, coarse), needed=lambda state: state[1].any(), xp=xp)[0]


def near_minimum(curve: Array, within: float, *, xp: ModuleType) -> Array:
    """Return which candidates are feasible and have a divergence that is at most so much above the least."""
    return curve <= xp.minimum(least(curve, xp=xp) + within, sys.float_info.max)


def _divergences(search: Search, selected: Array, *, xp: ModuleType) -> Array:
    """Return the divergences of the selected candidates, +inf where infeasible; other entries mean nothing.

    A candidate has a term for each non-empty bin between its end bins, and one each for P[0] and P[w - 1]. Empty bins
    need no term: they add their share of log(U / C) only. The losses are below 1.
    """
    window, layout = search.window, search.layout
    filled = nonzero_positions(search.values, search.sums.filled[: layout.num_bins], xp=xp)
    before = layout.after_first(search.sums.filled)
    bins = layout.before_last(search.sums.filled) - before
    means = (group.sliced / xp.maximum(group.support, 1) for group in (window.head, window.tail))
    fields = (window.loss_p, window.loss_q, window.first, window.last)
    table = stack_rows([layout.sizes().astype(xp.float64), before, bins, *fields, *means], xp=xp)

    def add_terms(candidates: Array, begin: Array, number: int) -> Array:
        _, _, origin = layout.bounds(candidates[:, None])
        chosen = Chosen(origin, *table[:, candidates, None])
        return divergence_terms(search, chosen, filled, begin + xp.arange(number), xp=xp).sum(axis=1)

    return xp.maximum(window.log_kept + sum_selected(add_terms, selected, bins + 2, ROOM, xp=xp), 0.0)


def divergence_terms(search: Search, chosen: Chosen, filled: Array, term: Array, *, xp: ModuleType) -> Array:
    """Return these terms of the divergence, shape (candidates, terms): 0 beyond the last one, +inf if infeasible.

    `filled` has the positions of the non-empty bins, in order.
    """
    p, q = _distributions(search, chosen, filled, term, xp=xp)
    left_p, left_q = p - chosen.loss_p, xp.where(q > 0, q - chosen.loss_q, search.eps)
    excess = xp.where(q > 0, (p - q) + (chosen.loss_q - chosen.loss_p), left_p - search.eps)
    feasible = (p == 0) | ((left_p > 0) & (left_q > 0))
    ratio = excess / left_q  # rounds to -1 where smoothing leaves almost nothing of p
    log_ratio = xp.where(ratio < -0.5, xp.log(left_p / left_q), xp.log1p(ratio))
    share = left_p / search.total
    return xp.where(feasible, xp.where(share > 0, share * log_ratio, 0.0), xp.inf)


def _distributions(
    search: Search, chosen: Chosen, filled: Array, term: Array, *, xp: ModuleType
) -> tuple[Array, Array]:
    """Return P and Q before smoothing in some of these bins: the first one, the non-empty ones, the last one."""
    inside, is_last = (term > 0) & (term <= chosen.bins), term == chosen.bins + 1
    position = filled[xp.clip(chosen.before.astype(xp.int64) + term - 1, 0, filled.shape[0] - 1)]
    position = xp.where(inside, position, chosen.origin)
    ends_p, ends_q = (
        xp.where(term == 0, first, xp.where(is_last, last, 0.0))
        for first, last in ((chosen.first, chosen.last), (chosen.head, chosen.tail))
    )
    level = _level(search, chosen, position, xp=xp)
    return xp.where(inside, search.values[position], ends_p), xp.where(inside, level, ends_q)


def _level(search: Search, chosen: Chosen, position: Array, *, xp: ModuleType) -> Array:
    """Return Q in these non-empty bins between the two end bins, before smoothing."""
    last, size = search.layout.levels - 1, chosen.size.astype(xp.int64)
    group = (position - chosen.origin + 0.5) / chosen.size  # so that no rounding crosses an integer
    group = xp.minimum(group.astype(xp.int64), last)
    low = chosen.origin + group * size
    counts, filled = between(search.sums, low, low + size, xp=xp)
    level = counts / xp.maximum(filled, 1)
    return xp.where(group == 0, chosen.head, xp.where(group == last, chosen.tail, level))
