"""Results as small HTML tables for notebooks."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .text import THRESHOLD_COLUMNS, threshold_cells
from .thresholds import LayerThreshold

MAX_ROWS = 30
_TEXTS = {"criterion", "layer", "name", "node", "note", "reason", "tensor"}  # columns of text; all others are numbers


def html_table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table of at most 30 rows, and the number of rows left out. All cells are escaped."""
    styles = [f'style="text-align: {"left" if column in _TEXTS else "right"}"' for column in columns]

    def line(tag: str, cells: Sequence[Any]) -> str:
        pairs = zip(styles, cells, strict=True)
        return "".join(["<tr>", *(f"<{tag} {style}>{escape(str(cell))}</{tag}>" for style, cell in pairs), "</tr>"])

    body = "".join(line("td", row) for row in rows[:MAX_ROWS])
    if len(rows) > MAX_ROWS:
        body += f'<tr><td colspan="{len(columns)}" style="text-align: left">... {len(rows) - MAX_ROWS} more</td></tr>'
    caption = f'<caption style="text-align: left">{escape(caption)}</caption>' if caption else ""
    return f"<table>{caption}<thead>{line('th', columns)}</thead><tbody>{body}</tbody></table>"


def html_thresholds(caption: str, of_what: str, thresholds: Mapping[str, LayerThreshold]) -> str:
    """Return a table of thresholds by layer or tensor."""
    rows = [(name, *threshold_cells(found).values()) for name, found in thresholds.items()]
    return html_table(caption, (of_what, *THRESHOLD_COLUMNS), rows)


def html_skipped(skipped: Mapping[str, str]) -> str:
    """Return a collapsed table of what stays in floating point and why, or nothing if it is empty."""
    if not skipped:
        return ""
    table = html_table("", ("name", "reason"), list(skipped.items()))
    return f"<details><summary>{len(skipped)} in floating point</summary>{table}</details>"
