"""``klquant report``: a saved calibration as an HTML page."""

import json
from pathlib import Path
from typing import Any

import click

from klquant.backends.calibration import Calibration
from klquant.backends.files import read_limited
from klquant.errors import InvalidInputError

from ..group import needed
from ..options import EXISTING, NEW, SAVED_CALIBRATION, json_option


@click.command()
@click.argument("calibration", type=SAVED_CALIBRATION)
@click.option("-o", "--out", type=NEW, default="report.html", show_default=True, help="HTML page to write.")
@click.option("--title", help="Heading of the page.  [default: file name of the calibration]")
@click.option("--diagnosis", type=EXISTING,
              help="JSON file from Diagnosis.as_json(); adds measured SQNR and sensitivity.")  # fmt: skip
@json_option
def report(calibration: Path, out: Path, title: str | None, diagnosis: Path | None, as_json: bool) -> None:
    """Write an HTML report about a calibration.

    The page shows thresholds, histograms and warnings. It opens from disk and needs no network. --json prints its
    numbers as well.

    \b
    Example:
      klquant report calib.npz -o report.html
      klquant report calib.npz -o report.html --json > report.json
    """  # noqa: D301
    reporting = needed("klquant.backends.report", "report")
    measured = None if diagnosis is None else _read_json(diagnosis)
    found = Calibration.load(calibration)
    written = reporting.write_report(found, out, title=title or calibration.name, diagnosis=measured, progress=True)
    warned = sum(bool(tensor.warnings) for tensor in written.tensors)
    click.echo(written.as_json() if as_json else f"{out}: {len(written.tensors)} tensors, {warned} with warnings")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_limited(path), parse_int=float)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"`{path}` must be a JSON file, got: {error}") from error
