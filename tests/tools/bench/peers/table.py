"""The table of results: printed at the end of a run, and as JSON."""

import contextlib
import json
import operator
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

RELATIONS = {"<=": operator.le, "<": operator.lt, ">=": operator.ge}


class Row(NamedTuple):
    name: str
    seconds: tuple[float, ...] = ()
    ratio: float | None = None
    label: str = ""
    wanted: tuple[str, float] | None = None  # the bar for the ratio, or for the milliseconds without one
    note: str = ""
    figures: Mapping[str, str] = {}  # further figures, each in its own column

    def cells(self):
        median = statistics.median(self.seconds) * 1e3 if self.seconds else None
        judged = median if self.ratio is None else self.ratio
        verdict = ""
        if self.wanted and judged is not None:
            verdict = "pass" if RELATIONS[self.wanted[0]](judged, self.wanted[1]) else "LOSES"
        return {
            "row": self.name,
            "median_ms": median,
            "min_ms": min(self.seconds) * 1e3 if self.seconds else None,
            "rounds": len(self.seconds),
            "ratio": self.ratio,
            "ratio_of": self.label,
            "wanted": "{} {:g}".format(*self.wanted) if self.wanted else "",
            "verdict": verdict,
            "note": self.note,
            "figures": dict(self.figures),
        }


class Report:
    """Collects the rows, and as a pytest plugin prints them at the end of the run.

    Times are medians, of the CPU time of the process unless the row, or `clock`, says that it is wall-clock time.
    """

    def __init__(self, provenance, title, clock="CPU ms"):
        self.rows = []
        self.provenance = provenance
        self.title = title
        self.clock = clock

    def add(self, *args, **fields):
        self.rows.append(Row(*args, **fields))

    def as_json(self):
        rows = [row.cells() for row in self.rows]
        return json.dumps({"provenance": self.provenance, "rows": rows}, indent=1)

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section(self.title)
        columns = list(dict.fromkeys(name for row in self.rows for name in row.figures))
        widths = [max(len(name), *(len(row.figures.get(name, "")) for row in self.rows)) for name in columns]
        layout = "{:<64} {:>9} {:>8} {:<20} {:>7}  " + "".join(f"{{:>{width}}}  " for width in widths) + "{}"
        terminalreporter.write_line(layout.format("row", self.clock, "ratio", "", "wanted", *columns, "").rstrip())
        for cells in (row.cells() for row in self.rows):
            result = ", ".join(filter(None, (cells["verdict"], cells["note"])))
            numbers = _number(cells["median_ms"]), _number(cells["ratio"])
            figures = (cells["figures"].get(name, "") for name in columns)
            line = layout.format(cells["row"], *numbers, cells["ratio_of"], cells["wanted"], *figures, result)
            terminalreporter.write_line(line.rstrip())
        terminalreporter.write_line("; ".join(f"{key} {value}" for key, value in self.provenance.items()))


@contextlib.contextmanager
def collected(plugins, *args, **options):
    """Yield a report that is printed at the end of the run, and written to ``KLQUANT_BENCH_JSON`` if that is set."""
    report = Report(*args, **options)
    plugins.register(report)
    yield report
    if "KLQUANT_BENCH_JSON" in os.environ:
        Path(os.environ["KLQUANT_BENCH_JSON"]).write_text(report.as_json() + "\n")


def _number(value):
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
