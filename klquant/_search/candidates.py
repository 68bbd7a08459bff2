"""The windows of all candidates: where they lie, and what is needed of each in O(1).

Where a window and its groups begin and end depends only on the number of bins and levels, so :class:`Layout` is plain
integers. With them :class:`Windows` takes P[0], P[w - 1], U, e_p, e_q and the first and last group of every candidate
from running sums. These two groups are kept apart from the others because only they can hold a bin where P != S.
"""

import functools
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from klquant._namespace import Array
from klquant._search.prefix_sums import Sums, counted
from klquant.divergence import smoothing_loss

Indices = np.ndarray[Any, np.dtype[np.int64]]


class Block(NamedTuple):
    """The candidates with the same merge factor m."""

    size: int
    """Bins per group, m."""
    base: int
    """The bin where the first interior group of the widest candidate begins."""
    narrowest: int
    """Index of the first candidate."""
    candidates: int
    """Number of candidates."""
    columns: int
    """Number of bins where the groups may begin: one for each candidate, or 1 if one-sided."""
    width: int
    """Number of windows [x, x + m) that can be an interior group, rounded up to a multiple of m."""


class Layout(NamedTuple):
    r"""The candidates of one search.

    Symmetric windows grow from the centre bin to both sides. One-sided windows hold the bins of \|x\| and grow from
    zero. In front of these lies an empty bin 0 in the place of the first bin, which S leaves out; the groups begin
    after it.
    """

    num_bins: int
    levels: int
    one_sided: bool
    alike: bool
    """Whether all blocks have as many columns and windows as the largest, so that JAX can loop over them."""

    @property
    def candidates(self) -> int:
        """Return the number of candidates."""
        return self.num_bins - self.levels if self.one_sided else self.num_bins // 2 - self.levels // 2 + 1

    def bounds(self, candidate: Array) -> tuple[Array, Array, Array]:
        """Return the start, the stop, and the origin of the groups of these candidates; the narrowest is number 0."""
        if self.one_sided:
            return 0 * candidate, candidate + self.levels + 1, 0 * candidate + 1
        half = candidate + self.levels // 2
        return self.num_bins // 2 - half, self.num_bins // 2 + half + 1, self.num_bins // 2 - half

    @functools.lru_cache(maxsize=256)  # noqa: B019 a layout is only four numbers
    def blocks(self) -> tuple[Block, ...]:
        """Return the blocks of all candidates, narrowest first."""
        origin, sizes = self.bounds(np.arange(self.candidates))[2], self.sizes()
        found = []
        for size in np.unique(sizes).tolist():
            members = np.flatnonzero(sizes == size)
            columns = 1 if self.one_sided else len(members)
            first, base = int(members[0]), int(origin[members[-1]]) + size
            width = size * (self.levels - 3 - (-columns // size))
            found.append(Block(size, base, first, len(members), columns, width))
        if self.alike:
            columns = max(block.columns for block in found)
            width = max(block.size * (self.levels - 3 - (-columns // block.size)) for block in found)
            found = [block._replace(columns=columns, width=width) for block in found]
        return tuple(found)

    @functools.lru_cache(maxsize=256)  # noqa: B019
    def members(self) -> Indices:
        """Return the candidates of each block, a row for each. Short rows are filled up with the next candidates."""
        first, count = np.asarray([(block.narrowest, block.candidates) for block in self.blocks()]).T
        members: Indices = np.minimum(first[:, None] + np.arange(count.max()), self.candidates - 1)
        return members

    @functools.lru_cache(maxsize=256)  # noqa: B019
    def block_of(self) -> Indices:
        """Return the number of the block of each candidate."""
        return np.repeat(np.arange(len(self.blocks())), [block.candidates for block in self.blocks()])

    @functools.lru_cache(maxsize=256)  # noqa: B019
    def columns(self) -> Indices:
        """Return the column of each candidate, where those of all blocks are joined. The widest one has the first."""
        pieces, begin = [], 0
        for block in self.blocks():
            back = np.zeros(block.candidates, np.int64) if self.one_sided else np.arange(block.candidates)[::-1]
            pieces.append(begin + back)
            begin += block.columns
        return np.concatenate(pieces)

    def padding(self) -> int:
        """Return how many bins the windows of the blocks reach beyond the last bin."""
        return max(0, max(block.base + block.size + block.width for block in self.blocks()) - self.num_bins)

    @functools.lru_cache(maxsize=256)  # noqa: B019
    def widths(self) -> Indices:
        """Return the number of bins of each candidate that its groups share."""
        _, stop, origin = self.bounds(np.arange(self.candidates))
        return np.asarray(stop - origin)

    def sizes(self) -> Indices:
        """Return the bins per group of each candidate, the merge factor."""
        return self.widths() // self.levels

    @functools.lru_cache(maxsize=256)  # noqa: B019
    def interior(self) -> Indices:
        """Return where the interior groups of each candidate, all but the first and last, begin and where they end."""
        _, _, origin = self.bounds(np.arange(self.candidates))
        return np.stack([origin + self.sizes(), origin + (self.levels - 1) * self.sizes()])

    def after_first(self, table: Array) -> Array:
        """Return the running sums behind the first bin of each candidate."""
        if self.one_sided:
            return table[..., np.ones(self.candidates, np.int64)]
        begin = self.num_bins // 2 - self.levels // 2 + 2
        return table[..., begin - self.candidates : begin][..., ::-1]

    def before_last(self, table: Array) -> Array:
        """Return the running sums in front of the last bin of each candidate."""
        return table[..., self.num_bins - self.candidates : self.num_bins]

    def after_last(self, table: Array) -> Array:
        """Return the running sums behind the last bin of each candidate."""
        return table[..., self.num_bins - self.candidates + 1 : self.num_bins + 1]


class Group(NamedTuple):
    """The first or last group of each candidate."""

    sliced: Array
    """A, the sum of S."""
    support: Array
    """N, the number of bins with P != 0."""
    mass: Array
    """M, the sum of P."""


class Windows(NamedTuple):
    """All candidates: arrays with an entry for each, narrowest first; counts are float64."""

    first: Array
    """P[0], the first bin and all bins before it."""
    last: Array
    """P[w - 1], the last bin and all bins after it."""
    inside: Array
    """U, the sum of S: the window without its first bin."""
    log_kept: Array
    """log(U / C)"""
    loss_p: Array
    """e_p, which smoothing takes from every non-zero P."""
    loss_q: Array
    """e_q, which smoothing takes from every non-zero Q."""
    head: Group
    """The first group, with P[0]."""
    tail: Group
    """The last group, with P[w - 1]."""
    interior: Array
    """The number of bins with P != 0 in all groups between these two."""


def all_windows(sums: Sums, layout: Layout, total: Array, eps: Array, *, xp: ModuleType) -> Windows:
    """Return the windows of all candidates.

    Interior groups have P = S, so A = 0 there only if N = 0. That leaves the two end groups where Q can be zero and P
    not: the first if its only mass is P[0], the last if its only mass is outliers. Their N bins are then zeros of Q.
    """
    whole = sums.table[:, -1:]
    begin, end = (sums.table.take(bins, axis=1, mode="clip") for bins in layout.interior())
    after_first, before_last, after_last = (
        take(sums.table) for take in (layout.after_first, layout.before_last, layout.after_last)
    )
    first, _ = counted(sums, after_first)
    last, _ = counted(sums, whole - before_last)
    beyond, _ = counted(sums, whole - after_last)
    inside, filled = counted(sums, after_last - after_first)
    only_beyond = (beyond > 0) & (before_last[1] == after_last[1])

    head = _group(sums, begin - after_first, first > 0, first)
    tail = _group(sums, after_last - end, only_beyond, beyond)
    support_p = filled + (first > 0) + only_beyond
    support_q = support_p - sum(xp.where(group.sliced > 0, 0, group.support) for group in (head, tail))
    loss_p, loss_q = (smoothing_loss(support, layout.widths(), eps, xp=xp) for support in (support_p, support_q))
    lost = first + beyond  # U = C - lost, and the logarithm is taken of the smaller one, which is the more precise
    kept = xp.where(lost < inside, xp.log1p(-lost / total), xp.log(inside / total))
    return Windows(first, last, inside, kept, loss_p, loss_q, head, tail, end[1] - begin[1])


def _group(sums: Sums, difference: Array, extra: Array, outliers: Array) -> Group:
    """Return the group with these sums of S; P has the outliers on top, and with `extra` one more non-zero bin."""
    sliced, filled = counted(sums, difference)
    return Group(sliced, filled + extra, sliced + outliers)
