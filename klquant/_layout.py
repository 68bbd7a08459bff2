"""Where the candidates' windows lie: plain integers, known before any count is."""

import functools
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

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
