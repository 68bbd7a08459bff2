"""Output of commands: tables, or JSON for programs."""

import json
import shlex
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from klquant.backends.ranges import Range
from klquant.backends.text import THRESHOLD_COLUMNS, number, threshold_cells, without_nan
from klquant.backends.thresholds import LayerThreshold

from .errors import printable

UNLIMITED = 10_000  # columns of a file or a pipe: names are not wrapped there
_LONG = {"tensor", "node", "why", "packages", "install with"}
_NUMBERS = {"amax", "T", "T/127", "T/amax", "clipped", "KL nats", "SQNR dB", "low", "high"}
_NUMBERS |= {"agreement", "MB", "ms", "in INT8"}


def say(text: str, *, colour: str | None = None) -> None:
    """Print a message on stderr; on a terminal coloured, and wrapped between words."""
    if sys.stderr.isatty():
        width = Console(stderr=True).width
        text = textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False, subsequent_indent="  ")
    click.echo(click.style(text, fg=colour) if colour else text, err=True)


def print_next(*words: object) -> None:
    """Print a command to paste that continues from here; words in capitals are to be filled in."""
    click.echo(f"next: {shlex.join(map(str, words))}")


def busy(what: str) -> Status:
    """Show a spinner on a terminal while the block runs."""
    return Console(stderr=True).status(what)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table, or its title alone if it has no rows."""
    rows, title = list(rows), printable(title)
    if not rows:
        click.echo(f"{title}: none")
        return
    click.echo(title)
    table = Table(
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    for column in columns:
        align: Literal["left", "right"] = "right" if column in _NUMBERS else "left"
        table.add_column(column, justify=align, no_wrap=column not in _LONG, overflow="fold")
    for row in rows:  # as Text, because rich reads brackets in names as styles
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console(width=None if sys.stdout.isatty() else UNLIMITED).print(table)


def print_thresholds(
    title: str, thresholds: Iterable[tuple[str, LayerThreshold]], ranges: Mapping[str, Range] | None = None
) -> None:
    """Print a table of thresholds by tensor, with the ends of quantized ranges if they are given."""
    ends = {name: tuple(map(number, found)) for name, found in (ranges or {}).items()}
    rows = ((name, *threshold_cells(found, missing="").values(), *ends.get(name, ())) for name, found in thresholds)
    print_table(title, ("tensor", *THRESHOLD_COLUMNS, *(("low", "high") if ends else ())), rows)


def threshold_record(name: str, found: LayerThreshold) -> dict[str, Any]:
    """Return a threshold for JSON, with the scale."""
    return {"tensor": name, **found._asdict(), "scale": found.scale}


def print_json(value: Any) -> None:
    """Print one JSON document, with null for NaN and infinity."""
    click.echo(json.dumps(without_nan(value), indent=2, allow_nan=False, default=str))
