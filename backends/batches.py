"""Calibration data, one batch at a time."""

from collections.abc import Iterable, Iterator
from typing import Any

from klquant.errors import KLQuantError


def numbered(batches: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Yield number and batch; an error of the data themselves passes through, with a note of the batch."""
    number = 0
    try:
        for batch in batches:
            yield number, batch
            number += 1
    except KLQuantError as error:
        raise type(error)(f"batch {number}: {error}") from error
    except Exception as error:
        notes = getattr(error, "__notes__", [])  # as add_note does, which Python 3.10 lacks
        error.__notes__ = [*notes, f"batch {number}: the data raised this instead of giving it"]
        raise
