"""What the first of two passes keeps in memory, so that the second counts it without running the model again."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

from klquant.errors import InvalidInputError

from .bins import BinsFor
from .statistics import Observation

KEEP_BYTES = 2**30
"""By default: the same on every machine, and little beside what a model needs."""


class KeptBatch(NamedTuple):
    """The observed tensors of one batch."""

    tensors: Any
    """As the backend likes to have them."""
    num_bytes: int
    digest: str = ""
    """Of the batch, where a checkpoint needs it."""


@runtime_checkable
class KeepingModel(Protocol):
    """What an :class:`ObservedModel` has, too, if its tensors can be kept."""

    def observe_and_keep(
        self, batch: Any, bins_for: BinsFor, number: int, room: int
    ) -> tuple[dict[str, Observation], KeptBatch | None]:
        """Do what `observe` does, and return the tensors too; None if they have more bytes than `room`.

        Nobody else may change the tensors later: what the model or the data may write to is copied.
        """

    def observe_kept(self, kept: KeptBatch, bins_for: BinsFor, number: int) -> dict[str, Observation]:
        """Return what `observe` returns for that batch, without running the model."""


class Kept:
    """The first batches of a pass over the data, as many as fit; each is freed when it has been counted.

    Parameters
    ----------
    keep_bytes : int
        How many bytes all tensors may have together, on the device that holds them. 0 keeps nothing.

    Raises
    ------
    InvalidInputError
        For a negative number, or what is no integer.
    """

    def __init__(self, keep_bytes: int = KEEP_BYTES) -> None:
        if not isinstance(keep_bytes, int) or isinstance(keep_bytes, bool) or keep_bytes < 0:
            raise InvalidInputError(f"`keep_bytes` must be 0 or a positive integer, got {keep_bytes!r:.80}")
        self._keep_bytes = keep_bytes
        self._data: Any = None
        self._clear()

    @property
    def num_batches(self) -> int:
        """Return the number of batches that are kept now."""
        return len(self._batches)

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all tensors that are kept now."""
        return sum(batch.num_bytes for batch in self._batches.values())

    @contextmanager
    def filling(self, data: Iterable[Any]) -> Iterator[None]:
        """Keep what is observed while the block runs: the first pass over `data`."""
        self._clear()
        self._data, self._room = data, self._keep_bytes
        try:
            yield
        except BaseException:
            self._clear()
            raise
        self._room = 0

    @contextmanager
    def emptying(self, data: Iterable[Any]) -> Iterator[None]:
        """Use what is kept while the block runs: the second pass, if it is over the same object."""
        if data is not self._data:
            self._clear()
        try:
            yield
        finally:
            self._clear()

    def all_numbers(self) -> range:
        """Return the numbers of all batches of the first pass; an empty range unless every one is kept."""
        return range(self._passed if len(self._batches) == self._passed else 0)

    def observe(
        self, model: Any, batch: Any, bins_for: BinsFor, number: int, *, with_digest: bool
    ) -> tuple[dict[str, Observation], str]:
        """Return what a batch holds and its digest: of a batch that is kept from memory, else from a run."""
        if number in self._batches:
            kept = self._batches.pop(number)
            return model.observe_kept(kept, bins_for, number), kept.digest
        self._passed, new = number + 1, None
        if self._room and isinstance(model, KeepingModel):
            found, new = model.observe_and_keep(batch, bins_for, number, self._room)
        else:
            found = model.observe(batch, bins_for, number)
        digest = model.digest(batch) if with_digest else ""
        self._room = self._room - new.num_bytes if new else 0  # full: later batches would only be kept in vain
        if new:
            self._batches[number] = new._replace(digest=digest)
        return found, digest

    def _clear(self) -> None:
        self._batches: dict[int, KeptBatch] = {}
        self._data = None
        self._room = self._passed = 0
