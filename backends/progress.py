"""Bars on a terminal."""

from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

_Item = TypeVar("_Item")


def tracked(items: Iterable[_Item], description: str) -> Iterable[_Item]:
    """Yield the items, with a progress bar if there is a description and a terminal."""
    console = Console(stderr=True)
    return track(items, description, console=console, disable=not (description and console.is_terminal))
