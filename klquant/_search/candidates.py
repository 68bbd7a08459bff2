"""The windows of all candidates: where they lie, and what is needed of each in O(1).

Where a window and its groups begin and end depends only on the number of bins and levels, so :class:`Layout` is plain
integers. With them :class:`Windows` takes P[0], P[w - 1], U, e_p, e_q and the first and last group of every candidate
from running sums. These two groups are kept apart from the others because only they can hold a bin where P != S.
"""

import functools
from itertools import groupby
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from klquant._namespace import Array
from klquant._search.prefix_sums import Sums, counts_between, filled_between
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


class BlockGroup(NamedTuple):
    """Blocks that are computed with arrays of the same shapes."""

    blocks: tuple[Block, ...]
    width: int
    """Number of windows [x, x + m) that can be an interior group."""
    columns: int
    """Number of bins where the groups may begin: one for each candidate of the largest block, or 1 if one-sided."""


class Layout(NamedTuple):
    r"""The candidates of one search.

    Symmetric windows grow from the centre bin to both sides. One-sided windows hold the bins of \|x\| and grow from
    zero. In front of these lies an empty bin 0 in the place of the first bin, which S leaves out; the groups begin
    after it.
    """

    num_bins: int
    levels: int
    one_sided: bool

    def bounds(self) -> tuple[Indices, Indices, Indices]:
        """Return the start, the stop, and the origin of the groups of every candidate, narrowest first."""
        if self.one_sided:
            stop = np.arange(self.levels, self.num_bins) + 1
            return np.zeros_like(stop), stop, np.ones_like(stop)
        half = np.arange(self.levels // 2, self.num_bins // 2 + 1)
        start = self.num_bins // 2 - half
        return start, self.num_bins // 2 + half + 1, start

    @functools.lru_cache(maxsize=256)  # noqa: B019 a layout is only three numbers
    def blocks(self) -> tuple[Block, ...]:
        """Return the blocks of all candidates, narrowest first."""
        _, stop, origin = self.bounds()
        sizes = (stop - origin) // self.levels
        found = []
        for size in np.unique(sizes).tolist():
            members = np.flatnonzero(sizes == size)
            found.append(Block(size, int(origin[members[-1]]) + size, int(members[0]), len(members)))
        return tuple(found)

    @functools.lru_cache(maxsize=256)  # noqa: B019
    def block_groups(self, *, alone: bool) -> tuple[BlockGroup, ...]:
        """Return each block `alone`, or together those whose m lies between the same powers of two."""
        groups = []
        for _, members in groupby(self.blocks(), key=lambda block: block.size if alone else block.size.bit_length()):
            blocks = tuple(members)
            size, columns = blocks[-1].size, 1 if self.one_sided else max(block.candidates for block in blocks)
            groups.append(BlockGroup(blocks, size * (self.levels - 3 - (-columns // size)), columns))
        return tuple(groups)

    def padding(self, *, alone: bool) -> int:
        """Return how many bins the windows of the groups reach beyond the last bin."""
        groups = self.block_groups(alone=alone)
        reach = [block.base + block.size + group.width for group in groups for block in group.blocks]
        return max(0, max(reach) - self.num_bins)


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

    start: Array
    """The first bin, which is in P but not in S."""
    stop: Array
    origin: Array
    """The bin where the groups begin: `start`, or one later in a one-sided search."""
    size: Array
    """Bins per group, the merge factor."""
    first: Array
    """P[0], the first bin and all bins before it."""
    last: Array
    """P[w - 1], the last bin and all bins after it."""
    beyond: Array
    """The outliers on the right, a part of `last`."""
    inside: Array
    """U, the sum of S: the window without its first bin."""
    loss_p: Array
    """e_p, which smoothing takes from every non-zero P."""
    loss_q: Array
    """e_q, which smoothing takes from every non-zero Q."""
    head: Group
    """The first group, with P[0]."""
    tail: Group
    """The last group, with P[w - 1]."""


def all_windows(sums: Sums, layout: Layout, eps: Array, *, xp: ModuleType) -> Windows:
    """Return the windows of all candidates.

    Interior groups have P = S, so A = 0 there only if N = 0. That leaves the two end groups where Q can be zero and P
    not: the first if its only mass is P[0], the last if its only mass is outliers. Their N bins are then zeros of Q.
    """
    levels, num_bins = layout.levels, layout.num_bins
    start, stop, origin = (xp.asarray(bound) for bound in layout.bounds())
    width = stop - origin
    size = width // levels
    first, beyond = counts_between(sums, 0, start + 1, xp=xp), counts_between(sums, stop, num_bins, xp=xp)
    only_beyond = (beyond > 0) & (filled_between(sums, stop - 1, stop) == 0)

    head = _group(sums, start + 1, origin + size, first > 0, first, xp=xp)
    tail = _group(sums, origin + (levels - 1) * size, stop, only_beyond, beyond, xp=xp)
    support_p = filled_between(sums, start + 1, stop) + (first > 0) + only_beyond
    support_q = support_p - sum(xp.where(end.sliced > 0, 0, end.support) for end in (head, tail))
    return Windows(
        start,
        stop,
        origin,
        size,
        first,
        last=counts_between(sums, stop - 1, num_bins, xp=xp),
        beyond=beyond,
        inside=counts_between(sums, start + 1, stop, xp=xp),
        loss_p=smoothing_loss(support_p, width, eps, xp=xp),
        loss_q=smoothing_loss(support_q, width, eps, xp=xp),
        head=head,
        tail=tail,
    )


def _group(sums: Sums, low: Array, high: Array, extra: Array, outliers: Array, *, xp: ModuleType) -> Group:
    """Return the group of S in low <= k < high; P has the outliers on top, and with `extra` one more non-zero bin."""
    sliced = counts_between(sums, low, high, xp=xp)
    return Group(sliced, filled_between(sums, low, high) + extra, sliced + outliers)


def log_kept(window: Windows, total: Array, *, xp: ModuleType) -> Array:
    """Return log(U / C). S lacks the first bin and all outliers, so U = C - lost.

    Of `lost` and U the smaller one has the better relative precision, and the logarithm is taken of that one.
    """
    lost = window.first + window.beyond
    return xp.where(lost < window.inside, xp.log1p(-lost / total), xp.log(window.inside / total))
