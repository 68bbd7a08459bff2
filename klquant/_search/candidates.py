"""Where the candidates' windows lie: plain integers, known before any count is."""

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
    """The candidates that share a merge factor."""

    size: int
    """Bins per group, m."""
    base: int
    """Where the first interior group of the widest candidate begins."""
    narrowest: int
    """Index of the first candidate."""
    candidates: int
    """Number of candidates."""


class BlockGroup(NamedTuple):
    """Blocks that are computed with the same shapes."""

    blocks: tuple[Block, ...]
    width: int
    """Number of windows [x, x + m)."""
    columns: int
    """Number of candidates whose groups begin at different bins, of the largest block."""


class Layout(NamedTuple):
    r"""The candidates of one search.

    Symmetric windows grow to both sides of the centre bin. One-sided ones hold the bins of \|x\| and grow from
    zero; there bin 0 stands for outliers on the left, which do not exist, and the groups begin behind it.
    """

    num_bins: int
    levels: int
    one_sided: bool

    def bounds(self) -> tuple[Indices, Indices, Indices]:
        """Return start, stop and origin of the groups of every candidate, from the narrowest."""
        if self.one_sided:
            stop = np.arange(self.levels, self.num_bins) + 1
            return np.zeros_like(stop), stop, np.ones_like(stop)
        half = np.arange(self.levels // 2, self.num_bins // 2 + 1)
        start = self.num_bins // 2 - half
        return start, self.num_bins // 2 + half + 1, start

    @functools.lru_cache(maxsize=256)  # noqa: B019 a layout is three numbers
    def blocks(self) -> tuple[Block, ...]:
        """Return the blocks of all candidates, from the narrowest to the widest."""
        _, stop, origin = self.bounds()
        sizes = (stop - origin) // self.levels
        found = []
        for size in np.unique(sizes).tolist():
            members = np.flatnonzero(sizes == size)
            found.append(Block(size, int(origin[members[-1]]) + size, int(members[0]), len(members)))
        return tuple(found)

    @functools.lru_cache(maxsize=256)  # noqa: B019
    def block_groups(self, *, alone: bool) -> tuple[BlockGroup, ...]:
        """Return the blocks each `alone`, or those together whose m lies between the same powers of two."""
        groups = []
        for _, members in groupby(self.blocks(), key=lambda block: block.size if alone else block.size.bit_length()):
            blocks = tuple(members)
            size, columns = blocks[-1].size, 1 if self.one_sided else max(block.candidates for block in blocks)
            groups.append(BlockGroup(blocks, size * (self.levels - 3 - (-columns // size)), columns))
        return tuple(groups)

    def padding(self, *, alone: bool) -> int:
        """Return how far beyond the bins the windows of the groups reach."""
        groups = self.block_groups(alone=alone)
        reach = [block.base + block.size + group.width for group in groups for block in group.blocks]
        return max(0, max(reach) - self.num_bins)


class Group(NamedTuple):
    """One group of each candidate."""

    sliced: Array
    """A: the sum of S."""
    support: Array
    """N: the number of bins with P != 0."""
    mass: Array
    """M: the sum of P."""


class Windows(NamedTuple):
    """All candidates at once: arrays over the candidates, from the narrowest; counts are float64."""

    start: Array
    """The first bin, which is in P and not in S."""
    stop: Array
    origin: Array
    """Where the groups begin: at the first bin, or behind it where it only stands for outliers that do not exist."""
    size: Array
    """Bins per group, the merge factor."""
    first: Array
    """P[0]: the first bin and all before it."""
    last: Array
    """P[w - 1]: the last bin and all after it."""
    beyond: Array
    """What `last` holds of outliers."""
    inside: Array
    """The sum of S: all of the window but its first bin."""
    loss_p: Array
    """What smoothing takes from every non-zero P."""
    loss_q: Array
    """What smoothing takes from every non-zero Q."""
    head: Group
    """The first group, which holds P[0]."""
    tail: Group
    """The last group, which holds P[w - 1]."""


def all_windows(sums: Sums, layout: Layout, eps: float, *, xp: ModuleType) -> Windows:
    """Return the windows of all candidates."""
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
    """Return the group with S in low <= k < high, and in P one more bin (if `extra`) and the outliers."""
    sliced = counts_between(sums, low, high, xp=xp)
    return Group(sliced, filled_between(sums, low, high) + extra, sliced + outliers)


def log_kept(window: Windows, total: Array, *, xp: ModuleType) -> Array:
    """Return log(sum S / sum P): S lacks the first bin and all outliers."""
    lost = window.first + window.beyond  # exact where it is small, as `inside` is where that is
    return xp.where(lost < window.inside, xp.log1p(-lost / total), xp.log(window.inside / total))
