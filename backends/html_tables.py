"""Results as small HTML tables, which notebooks show, and numbers as people read them."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .thresholds import LayerThreshold

MISSING = "\N{EN DASH}"
MAX_ROWS = 30
_TEXTS = {"criterion", "layer", "name", "node", "note", "reason", "tensor"}  # columns; all others are numbers
_FOUND = ("criterion", "amax", "T", "T/amax", "clipped", "KL nats", "SQNR dB")


def number(value: float, form: str = ".4g") -> str:
    """Return a number as text, a dash where there is none."""
    if math.isfinite(value):
        return format(value, form)
    return MISSING if math.isnan(value) else "\N{INFINITY}" if value > 0 else "-\N{INFINITY}"


def percent(share: float) -> str:
    """Return a share in percent."""
    return number(100 * share, ".3g") + (" %" if math.isfinite(share) else "")


def ratio(found: LayerThreshold) -> float:
    """Return T / amax; NaN for a tensor that is always 0."""
    return found.threshold / found.amax if found.amax else math.nan


def html_table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table of at most 30 rows, then how many there are more. Nothing in it is taken for HTML."""
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
    """Return a table of what was found for every layer or tensor."""
    rows = [
        (
            name,
            found.criterion,
            number(found.amax),
            number(found.threshold),
            number(ratio(found), ".3f"),
            percent(found.clipped),
            number(found.divergence, ".3g"),
            number(found.sqnr_db, ".1f"),
        )
        for name, found in thresholds.items()
    ]
    return html_table(caption, (of_what, *_FOUND), rows)


def html_skipped(skipped: Mapping[str, str]) -> str:
    """Return, folded away, what stays in floating point and why; nothing if that is nothing."""
    if not skipped:
        return ""
    table = html_table("", ("name", "reason"), list(skipped.items()))
    return f"<details><summary>{len(skipped)} in floating point</summary>{table}</details>"
