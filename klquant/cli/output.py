"""What commands print: tables for people, JSON for programs."""

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from klquant.backends.thresholds import LayerThreshold

from .errors import printable

UNLIMITED = 10_000  # columns where nobody looks: names are neither wrapped nor cut in a file or a pipe
THRESHOLD_COLUMNS = ("tensor", "criterion", "amax", "T", "T/amax", "clipped", "KL nats", "SQNR dB")
_LONG = {"tensor", "node", "why", "packages", "install with"}
_NUMBERS = {"amax", "T", "T/127", "T/amax", "clipped", "KL nats", "SQNR dB"}


def busy(what: str) -> Status:
    """Show on a terminal that something takes its time."""
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
    for row in rows:  # as Text: names may hold brackets, which rich would take for styles
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console(width=None if sys.stdout.isatty() else UNLIMITED).print(table)


def threshold_row(name: str, found: LayerThreshold) -> tuple[str, ...]:
    """Return the cells of THRESHOLD_COLUMNS."""
    ratio = found.threshold / found.amax if found.amax else math.nan
    return (
        name,
        found.criterion,
        number(found.amax),
        number(found.threshold),
        number(ratio, ".3f"),
        number(found.clipped, ".3%"),
        number(found.divergence, ".3g"),
        number(found.sqnr_db, ".1f"),
    )


def threshold_record(name: str, found: LayerThreshold) -> dict[str, Any]:
    """Return the same for JSON, with the scale."""
    return {"tensor": name, **found._asdict(), "scale": found.scale}


def number(value: float, form: str = ".4g") -> str:
    """Return a number as text, nothing for NaN."""
    return "" if math.isnan(value) else format(value, form)


def print_json(value: Any) -> None:
    """Print one JSON document; numbers that JSON does not know become null."""
    click.echo(json.dumps(_finite(value), indent=2, allow_nan=False, default=str))


def _finite(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
