"""Split data into a part for calibration and a part that is held back to measure accuracy."""

from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any, NamedTuple

from ..batches import check_repeatable

EVERY = 4  # the last of so many batches is held back
REMEDY = "pass a list, or another iterable that starts again"


class _Part(Iterable[Any]):
    """Some of the batches, which are read anew in each iteration."""

    def __init__(self, batches: Iterable[Any], numbers: Sequence[int]) -> None:
        self._batches, self._numbers = batches, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self._batches, Sequence):
            yield from (self._batches[k] for k in self._numbers)
        else:
            wanted = set(self._numbers)
            yield from (batch for k, batch in enumerate(self._batches) if k in wanted)


class Split(NamedTuple):
    """Data for calibration, and data to measure on."""

    calibration: Iterable[Any]
    validation: Iterable[Any]


def hold_back(batches: Iterable[Any], validation: Iterable[Any] | None) -> Split:
    """Return the data of both purposes: every fourth batch is held back, unless there are fewer or others are given.

    Parameters
    ----------
    batches : iterable
        That can be iterated several times.
    validation : iterable, optional
        Batches to measure on. By default every fourth one of `batches`; of fewer than four all serve both purposes.

    Returns
    -------
    Split

    Raises
    ------
    InvalidInputError
        For iterators, which can be iterated only once.
    """
    check_repeatable(batches, REMEDY)
    if validation is not None:
        check_repeatable(validation, REMEDY)
        return Split(batches, validation)
    number = len(batches) if isinstance(batches, Sized) else sum(1 for _ in batches)
    if number < EVERY:
        return Split(batches, batches)
    held = range(EVERY - 1, number, EVERY)
    return Split(_Part(batches, [k for k in range(number) if k not in held]), _Part(batches, held))
