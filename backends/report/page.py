"""The HTML page: one file that needs no network and no other file.

Tables are plain HTML, so the page can be read, searched and printed without JavaScript. JavaScript adds sorting,
filtering and charts. uPlot draws the charts (MIT, 51 KB, no dependencies, bundled here); plotly would add 4.6 MB and
vega-lite 800 KB.

Names come from untrusted models: jinja2 escapes them, the JSON in the page contains no ``<``, scripts write only text,
and the content security policy allows no loading and no scripts except those listed by their hash.
"""

import base64
import hashlib
import json
import math
import shlex
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TypedDict, Unpack

from klquant.errors import MissingDependencyError

from ..calibration import Calibration
from ..files import write_atomic
from ..text import number, percent
from .charts import outline, sparkline
from .data import Report, Tensor, describe, sqnr_of
from .diagnosis import Diagnosed

FOLDER = Path(__file__).parent
_STYLES = ("uPlot.min.css", "page.css")
_SCRIPTS = ("uPlot.min.js", "tables.js", "copy.js", "charts.js", "layer.js")  # uPlot 1.6.32


class Content(TypedDict, total=False):
    """What a report says beside the calibration; see :func:`describe`."""

    diagnosis: Diagnosed | None
    weight_scales: Mapping[str, Any] | None
    verdict: str
    ways: Iterable[Mapping[str, str]]
    next_steps: Iterable[str]
    progress: bool


def render_html(report: Report) -> str:
    """Return a report as an HTML page.

    Parameters
    ----------
    report : Report

    Returns
    -------
    str
        HTML that opens from disk, about 12 KB for each tensor with 4001 bins.

    Raises
    ------
    MissingDependencyError
        Without jinja2.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingDependencyError("the report needs jinja2: pip install 'klquant[report]'") from error
    environment = jinja2.Environment(
        autoescape=True,
        loader=jinja2.FileSystemLoader(FOLDER),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "sortable": _sortable, "options": _options}
    environment.filters |= {"in_python": _in_python, "in_shell": _in_shell, "sqnr": sqnr_of}
    environment.filters |= {"share_of_range": _share_of_range, "columns": _columns}
    environment.globals |= {"sparkline": sparkline, "outline": outline}
    scripts = {name: _read(name) for name in _SCRIPTS}
    return environment.get_template("page.html").render(
        report=report,
        data=report.as_json().replace("<", "\\u003c"),
        styles="\n".join(_read(name) for name in _STYLES),
        scripts=scripts.values(),
        hashes=[_hash_of(script) for script in scripts.values()],
        license=_read("uPlot.LICENSE.txt"),
    )


def write_report(
    calibration: Calibration,
    path: str | Path,
    *,
    json_path: str | Path | None = None,
    title: str = "Calibration report",
    **content: Unpack[Content],
) -> Report:
    """Write an HTML page about a calibration, and its numbers as JSON if `json_path` is given.

    Parameters
    ----------
    calibration : Calibration
    path : str or Path
        Of the page. Each file is written whole or not at all.
    json_path : str or Path, optional
        Of the JSON.
    title
        Heading of the page.
    **content
        As for :func:`describe`: ``diagnosis``, ``weight_scales``, ``verdict``, ``ways``, ``next_steps``, ``progress``.

    Returns
    -------
    Report
        What was written.

    Raises
    ------
    InvalidInputError
        As for :func:`describe`.
    MissingDependencyError
        Without jinja2.
    """
    report = describe(calibration, title=title, **content)
    write_atomic(Path(path), render_html(report).encode())
    if json_path is not None:
        write_atomic(Path(json_path), report.as_json().encode())
    return report


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _hash_of(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _sortable(value: float | None) -> str:
    """Return a number in the syntax of JavaScript, or nothing if it is missing."""
    return "" if value is None or math.isnan(value) else "Infinity" if value == math.inf else repr(float(value))


def _share_of_range(tensor: Tensor) -> float:
    """Return the chosen T as a share of the histogram's range."""
    bars = tensor.bars
    return min(2 * tensor.chosen.threshold / (bars.bin_width * bars.num_bins), 1.0) if bars else 0.0


def _in_python(better: Mapping[str, str]) -> str:
    """Return overrides to paste into Python."""
    return f"overrides={json.dumps({name: {'criterion': how} for name, how in better.items()}, ensure_ascii=False)}"


def _in_shell(better: Mapping[str, str]) -> str:
    """Return overrides to paste into a command line."""
    return " ".join(f"--override {shlex.quote(f'{name}={how}')}" for name, how in better.items())


def _columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(chain.from_iterable(rows)))


def _options(settings: Mapping[str, Any]) -> list[str]:
    """Return the settings that are not empty as short texts."""
    plain = [f"{key} {value}" for key, value in settings.items() if not isinstance(value, (Mapping, tuple, list))]
    listed = [f"{key} {', '.join(settings[key])}" for key in ("include", "exclude") if settings[key]]
    overrides = [
        f"{pattern}: {', '.join(f'{key} {value}' for key, value in options.items() if value is not None)}"
        for pattern, options in settings["overrides"].items()
    ]
    return [*plain, *listed, *overrides]
