"""The divergence of chosen candidates, summed bin by bin over the non-empty bins of their windows.

This is sum p log(p / q) itself, without a series. It costs a term for each non-empty bin, so the search uses it only
for the candidates that the closed form leaves out, and to decide between near-ties.

The logarithm is taken of 1 + (p - q) / q, with log1p where the ratio is small. So a term is off by a few roundings of
p times 1 + |log(p / q)|, however large C is, and D by about 1e-16 where it is small. Where P and Q are equal, D is
exactly 0. The closed form cannot do that, for it subtracts two sums that are far larger than D.
"""

from types import ModuleType
from typing import NamedTuple

from klquant._namespace import Array, fixed_shapes, map_selected, repeat
from klquant._search.candidates import Layout, Windows
from klquant._search.prefix_sums import Sums, between, filled_between

NEAR = 1e-12  # nats: well above the error of the closed form (`klquant._search` has its budget)
TILE = 32  # bins that JAX adds at a time
ROOM = 2**16  # entries of the temporary arrays


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


class Chosen(NamedTuple):
    """The windows of some candidates: arrays of shape (candidates, 1)."""

    start: Array
    stop: Array
    origin: Array
    size: Array
    first: Array
    last: Array
    loss_p: Array
    loss_q: Array
    log_kept: Array
    head: Array
    """Q in the first group before smoothing, 0 if the group is empty."""
    tail: Array
    """The same of the last group."""


def settled_curve(curve: Array, search: Search, coarse: Array, *, ties: bool, xp: ModuleType) -> Array:
    """Return the curve with the `coarse` candidates bin by bin, and then with all that are near the minimum, if `ties`.

    Both are one loop, because its body is much code for a compiler.
    """

    def settle(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        curve, selected = state
        curve = xp.where(selected, _divergences(search, selected, xp=xp), curve)
        near = xp.isfinite(curve) & (curve <= curve.min() + NEAR)
        return curve, near & ~coarse & (xp.where(near, 1.0, 0.0).sum() > 1)

    return repeat(settle, 1 + ties, (curve, coarse), xp=xp)[0]


def _divergences(search: Search, selected: Array, *, xp: ModuleType) -> Array:
    """Return the divergences of the selected candidates; other entries mean nothing."""
    window = search.window
    bins = filled_between(search.sums, window.start + 1, window.stop - 1)
    fields = (window.first, window.last, window.loss_p, window.loss_q, window.log_kept)
    means = (group.sliced / xp.maximum(group.support, 1) for group in (window.head, window.tail))
    table = xp.stack([*fields, *means])

    def divergences(candidates: Array, most: Array) -> Array:
        start, stop, origin = search.layout.bounds(candidates[:, None])
        size = (stop - origin) // search.layout.levels
        chosen = Chosen(start, stop, origin, size, *table[:, candidates, None])
        return direct_divergence(search, chosen, most, xp=xp)

    return map_selected(divergences, selected, bins, ROOM, xp=xp)


def direct_divergence(search: Search, chosen: Chosen, most: Array, *, xp: ModuleType) -> Array:
    """Return the divergence of these candidates, shape (candidates,); +inf where infeasible. The losses are below 1.

    `most` is the largest number of non-empty bins between the end bins of a window. These bins are the terms of a row,
    and P[0] and P[w - 1] two more. Empty bins need no term: they add their share of log(U / C) only.
    """
    width = TILE if fixed_shapes(xp=xp) else int(most) + 2

    def add(tile: Array, divergence: Array) -> Array:
        p, q = _distributions(search, chosen, tile, width, xp=xp)
        left_p, left_q = p - chosen.loss_p, xp.where(q > 0, q - chosen.loss_q, search.eps)
        excess = xp.where(q > 0, (p - q) + (chosen.loss_q - chosen.loss_p), left_p - search.eps)
        feasible = (p == 0) | ((left_p > 0) & (left_q > 0))
        ratio = excess / left_q  # rounds to -1 where smoothing leaves almost nothing of p
        log_ratio = xp.where(ratio < -0.5, xp.log(left_p / left_q), xp.log1p(ratio))
        share = left_p / search.total
        terms = xp.where(share > 0, share * log_ratio, 0.0)
        return divergence + xp.where(feasible, terms, xp.inf).sum(axis=1)

    divergence = repeat(add, (most + 1) // width + 1, chosen.log_kept[:, 0], xp=xp)
    return xp.maximum(divergence, 0.0)


def _distributions(search: Search, chosen: Chosen, tile: Array, width: int, *, xp: ModuleType) -> tuple[Array, Array]:
    """Return P and Q before smoothing, in `width` of the bins: the first one, the non-empty ones, the last one."""
    sums, positions = search.sums, search.filled
    before = sums.filled[chosen.start + 1]
    term, bins = tile * width + xp.arange(width), sums.filled[chosen.stop - 1] - before
    position = positions[xp.clip(before + term - 1, 0, positions.shape[0] - 1)]
    inside, is_last = (term > 0) & (term <= bins), term == bins + 1
    position = xp.where(inside, position, chosen.start)
    level = _level(search, chosen, position, xp=xp)
    ends_p, ends_q = (
        xp.where(term == 0, first, xp.where(is_last, last, 0.0))
        for first, last in ((chosen.first, chosen.last), (chosen.head, chosen.tail))
    )
    return xp.where(inside, search.values[position], ends_p), xp.where(inside, level, ends_q)


def _level(search: Search, chosen: Chosen, position: Array, *, xp: ModuleType) -> Array:
    """Return Q in these non-empty bins between the two end bins, before smoothing."""
    last = search.layout.levels - 1
    group = xp.minimum((position - chosen.origin) // chosen.size, last)
    low = chosen.origin + group * chosen.size
    counts, filled = between(search.sums, low, low + chosen.size, xp=xp)
    level = counts / xp.maximum(filled, 1)
    return xp.where(group == 0, chosen.head, xp.where(group == last, chosen.tail, level))
