"""Calibration data, one batch at a time."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from operator import length_hint
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress

from klquant.errors import InvalidInputError, KLQuantError


def check_iterable(batches: Iterable[Any]) -> None:
    """Raise InvalidInputError for data that cannot be iterated, such as None or a function."""
    if not (hasattr(type(batches), "__iter__") or hasattr(type(batches), "__getitem__")):
        raise InvalidInputError(
            f"`batches` must be an iterable of batches, such as a list or a DataLoader, got {type(batches).__name__}"
        )


def check_repeatable(batches: Iterable[Any], remedy: str) -> None:
    """Raise InvalidInputError for data that can be iterated only once, or never; the message ends with the remedy."""
    check_iterable(batches)
    if isinstance(batches, Iterator):
        if isinstance(batches, islice):
            remedy = "pass the data themselves and num_batches="
        raise InvalidInputError(
            f"`batches` must be an iterable that can be iterated twice, got the one-shot {type(batches).__name__}; "
            f"{remedy}"
        )


class _First:
    """The first batches of data that can be iterated again."""

    def __init__(self, batches: Iterable[Any], number: int) -> None:
        self._batches, self._number = batches, number

    def __iter__(self) -> Iterator[Any]:
        return islice(self._batches, self._number)

    def __length_hint__(self) -> int:
        return min(_length(self._batches) or self._number, self._number)


def first_batches(batches: Iterable[Any], number: int | None) -> Iterable[Any]:
    """Return so many batches, which can be iterated as often as the data; None means all of them."""
    check_iterable(batches)
    if number is None:
        return batches
    if not isinstance(number, int) or number < 1:
        raise InvalidInputError(f"`num_batches` must be 1 or more, got {number!r}")
    return islice(batches, number) if isinstance(batches, Iterator) else _First(batches, number)


def numbered(batches: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Yield number and batch; an error that the data raise gets a note with the number."""
    number = 0
    try:
        for batch in batches:
            yield number, batch
            number += 1
    except KLQuantError as error:
        raise type(error)(f"batch {number}: {error}") from error
    except Exception as error:
        error.add_note(f"batch {number}: the data raised this instead of yielding it")
        raise


_Item = TypeVar("_Item")


def _console() -> Console | None:
    """Return where bars are shown: a terminal, or a notebook that has the widgets for it."""
    console = Console(stderr=True)
    widgets = console.is_jupyter and find_spec("ipywidgets") is not None
    return console if console.is_terminal or widgets else None


@contextmanager
def progress_bar(description: str, batches: Iterable[Any], *, steps: int = 1) -> Iterator[Callable[[], None]]:
    """Show a bar while the block runs, and yield the function that advances it: `steps` times for each batch.

    There is no bar without a description, or a terminal or notebook.
    """
    if not (description and (console := _console())):
        yield lambda: None  # a disabled bar of rich before 14.1 prints an empty line
        return
    length = _length(batches)
    with Progress(console=console) as bar:
        task = bar.add_task(description, total=None if length is None else steps * length)
        yield lambda: bar.advance(task)


def tracked(items: Iterable[_Item], description: str) -> Iterator[_Item]:
    """Yield the items, with a progress bar if there is a description, and a terminal or notebook."""
    check_iterable(items)
    with progress_bar(description, items) as advance:
        for item in items:
            yield item
            advance()


def _length(items: Iterable[Any]) -> int | None:
    """Return the number of items, None if it is not known: streams and readers raise one error or another."""
    try:
        return length_hint(items) or None
    except Exception:
        return None
