"""Count a tensor on the host in all threads of torch, bit for bit as :func:`klquant.histogram` counts."""

import math
from typing import NamedTuple

import numpy as np
import torch

from ...collection import Bins, Counted
from ...collection.bins import join_halves
from .parts import parts

_ROW = 2**16  # values of a thread in a chunk: they stay in its cache
_EXACT = (torch.float32, torch.bfloat16, torch.float16)  # which float64 multiplies as the core does
_MOST_THREADS = 16  # that have a row
_MOST_CHUNKS = 256  # of different lengths that are kept
_HUGE = 2**21  # bytes of a huge page


class Looked(NamedTuple):
    """What a look at a tensor gives."""

    low: float
    high: float
    """NaN, as `low`, if there is a NaN; the counts are then of no use."""
    counted: Counted


class Chunk(NamedTuple):
    """Memory for as many values as a chunk has."""

    wide: torch.Tensor
    """float64, in the same memory as `numbers`."""
    numbers: torch.Tensor
    """int64."""
    rows: torch.Tensor
    """The numbers in a row for each thread."""
    rest: torch.Tensor
    """The numbers that these rows lack."""
    is_nonzero: torch.Tensor
    """bool."""


class Buffers:
    """Memory for chunks and counts, allocated once: page faults of new memory can cost as much as counting in it."""

    def __init__(self) -> None:
        self.threads = min(torch.get_num_threads(), _MOST_THREADS)
        self._memory = self._table = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._chunks: dict[int, Chunk] = {}

    def chunk(self, length: int) -> Chunk:
        """Return memory for this many values."""
        if 9 * length > len(self._memory):
            self._memory, self._chunks = _memory(9 * length), {}
        if len(self._chunks) > _MOST_CHUNKS:
            self._chunks = {}
        if length not in self._chunks:
            wide, even = self._memory[: 8 * length], length // self.threads * self.threads
            numbers, is_nonzero = wide.view(torch.int64), self._memory[8 * length : 9 * length].view(torch.bool)
            rows = numbers[:even].view(self.threads, -1)
            self._chunks[length] = Chunk(wide.view(torch.float64), numbers, rows, numbers[even:], is_nonzero)
        return self._chunks[length]

    def table(self, length: int) -> torch.Tensor:
        """Return a row of int64 zeros for each thread."""
        size = 8 * self.threads * length
        if size > len(self._table):
            self._table = _memory(size)
        return self._table[:size].view(torch.int64).view(self.threads, length).zero_()


def _memory(length: int) -> torch.Tensor:
    """Return bytes, in huge pages if the system has them.

    NumPy asks for them if an array has 4 MiB. A chunk in hundreds of small pages would miss the TLB after each layer.
    """
    array = np.empty(length if length < _HUGE // 8 else max(length + _HUGE, 2 * _HUGE), np.uint8)
    start = -array.ctypes.data % _HUGE if len(array) > length else 0
    return torch.from_numpy(array[start : start + length])


def can_count(tensor: torch.Tensor, bins: Bins) -> bool:
    """Return whether :func:`look_on_threads` takes this tensor and these bins."""
    fits = bins.num_bins >= 3 and bins.num_bins % 2 == 1 and bins.amax > 0 and bins.half_bins[0] < math.inf
    return fits and tensor.numel() > 0 and tensor.dtype in _EXACT and tensor.device.type == "cpu"


@torch.inference_mode(False)  # buffers made in inference mode could not be written to outside of it
@torch.no_grad()
def look_on_threads(tensor: torch.Tensor, bins: Bins, buffers: Buffers) -> Looked:
    """Find the extremes of a tensor and count its values; those beyond the range go to the end bins.

    The values are read from memory once, in the order in which they are stored, and not copied as a whole.
    """
    low, high, zeros = math.inf, -math.inf, 0
    table = buffers.table(2 * bins.num_bins + 1)
    for part in parts(tensor, buffers.threads * _ROW):
        chunk = buffers.chunk(part.numel())
        chunk.wide.view(part.shape).copy_(part)
        near = part if part.is_contiguous() else chunk.wide  # both are in the cache now
        begin, end = (bound.item() for bound in near.aminmax())
        low, high = min(low, begin), max(high, end)
        if not math.isfinite(end - begin):
            return Looked(begin, end, Counted(np.zeros(0, np.int64), 0))
        chunk.is_nonzero.view(part.shape).copy_(part)
        zeros += part.numel() - int(np.count_nonzero(chunk.is_nonzero.numpy()))
        first = _to_half_bins(chunk, (begin, end), bins)
        _add_counts(table[:, bins.num_bins + first :], chunk)
    return Looked(low, high, Counted(join_halves(table.sum(0).numpy(), bins.num_bins), zeros))


def _to_half_bins(chunk: Chunk, ends: tuple[float, float], bins: Bins) -> int:
    """Write the numbers of the half bins over the values, less the number of the first one, which is returned."""
    (times, over), limit = bins.half_bins, bins.num_bins
    chunk.wide.mul_(times)
    if over != 1:
        chunk.wide.div_(over)
    if max(-ends[0], ends[1]) * times / over >= limit + 1:
        chunk.wide.clamp_(-limit, limit)
    chunk.numbers.copy_(chunk.wide)  # rounds towards 0
    if ends[0] >= 0:
        return 0
    chunk.numbers.add_(limit)
    return -limit


def _add_counts(table: torch.Tensor, chunk: Chunk) -> None:
    """Add to the table: ``scatter_add_`` gives a row to each thread, with its part of the numbers."""
    one = torch.ones(1, dtype=torch.int64, device="cpu")
    table.scatter_add_(1, chunk.rows, one.expand_as(chunk.rows))
    if len(chunk.rest):
        table[0].scatter_add_(0, chunk.rest, one.expand_as(chunk.rest))
