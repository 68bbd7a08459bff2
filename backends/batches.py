"""Calibration data, one batch at a time."""

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress, track

from klquant.errors import InvalidInputError, KLQuantError


def check_repeatable(batches: Iterable[Any], remedy: str) -> None:
    """Raise InvalidInputError for data that can be iterated only once; the message ends with the remedy."""
    if isinstance(batches, Iterator):
        raise InvalidInputError(
            f"`batches` must be an iterable that can be iterated twice, got the one-shot {type(batches).__name__}; "
            f"{remedy}"
        )


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


@contextmanager
def progress_bar(description: str, batches: Iterable[Any], *, steps: int = 1) -> Iterator[Callable[[], None]]:
    """Show a bar while the block runs, and yield the function that advances it: `steps` times for each batch.

    There is no bar without a description or a terminal.
    """
    if not (description and (console := Console(stderr=True)).is_terminal):
        yield lambda: None  # a disabled bar of rich before 14.1 prints an empty line
        return
    total = steps * len(batches) if isinstance(batches, Sized) else None
    with Progress(console=console) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)


def tracked(items: Iterable[_Item], description: str) -> Iterable[_Item]:
    """Yield the items, with a progress bar if there is a description and a terminal."""
    console = Console(stderr=True)
    return track(items, description, console=console) if description and console.is_terminal else items
