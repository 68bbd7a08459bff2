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
from klquant._search.prefix_sums import Sums, between, counts_between, filled_between
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
        _, stop, origin = self.bounds(np.arange(self.candidates))
        sizes = (stop - origin) // self.levels
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

    def members(self) -> Indices:
        """Return the candidates of each block, a row for each. Short rows are filled up with the next candidates."""
        first, count = np.asarray([(block.narrowest, block.candidates) for block in self.blocks()]).T
        members: Indices = np.minimum(first[:, None] + np.arange(count.max()), self.candidates - 1)
        return members

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


def all_windows(sums: Sums, layout: Layout, eps: Array, *, xp: ModuleType) -> Windows:
    """Return the windows of all candidates.

    Interior groups have P = S, so A = 0 there only if N = 0. That leaves the two end groups where Q can be zero and P
    not: the first if its only mass is P[0], the last if its only mass is outliers. Their N bins are then zeros of Q.
    """
    levels, num_bins = layout.levels, layout.num_bins
    start, stop, origin = layout.bounds(np.arange(layout.candidates))
    width = stop - origin
    size = width // levels
    first, _ = between(sums, 0, start + 1, xp=xp)
    beyond, _ = between(sums, stop, num_bins, xp=xp)
    inside, filled = between(sums, start + 1, stop, xp=xp)
    last, _ = between(sums, stop - 1, num_bins, xp=xp)
    only_beyond = (beyond > 0) & (filled_between(sums, stop - 1, stop) == 0)

    head = _group(sums, start + 1, origin + size, first > 0, first, xp=xp)
    tail = _group(sums, origin + (levels - 1) * size, stop, only_beyond, beyond, xp=xp)
    support_p = filled + (first > 0) + only_beyond
    support_q = support_p - sum(xp.where(end.sliced > 0, 0, end.support) for end in (head, tail))
    loss_p, loss_q = (smoothing_loss(support, width, eps, xp=xp) for support in (support_p, support_q))
    kept = _log_kept(inside, first + beyond, counts_between(sums, 0, num_bins, xp=xp), xp=xp)
    return Windows(start, stop, origin, size, first, last, inside, kept, loss_p, loss_q, head, tail)


def _group(sums: Sums, low: Array, high: Array, extra: Array, outliers: Array, *, xp: ModuleType) -> Group:
    """Return the group of S in low <= k < high; P has the outliers on top, and with `extra` one more non-zero bin."""
    sliced, filled = between(sums, low, high, xp=xp)
    return Group(sliced, filled + extra, sliced + outliers)


def _log_kept(inside: Array, lost: Array, total: Array, *, xp: ModuleType) -> Array:
    """Return log(U / C). S lacks the first bin and all outliers, so U = C - lost.

    Of `lost` and U the smaller one has the better relative precision, and the logarithm is taken of that one.
    """
    return xp.where(lost < inside, xp.log1p(-lost / total), xp.log(inside / total))
