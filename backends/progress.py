"""Bars on a terminal."""

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress, track

_Item = TypeVar("_Item")


@contextmanager
def progress_bar(description: str, batches: Iterable[Any], *, steps: int = 1) -> Iterator[Callable[[], None]]:
    """Show a bar while the block runs, and give it the function that advances it: `steps` times for each batch.

    Without a description, or where nobody looks, there is none.
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
