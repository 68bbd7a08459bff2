"""``klquant convert``: one table of scales becomes another."""

from collections.abc import Mapping
from pathlib import Path
from zipfile import is_zipfile

import click

from klquant.backends.formats import FORMATS, read_table, write_table
from klquant.errors import InvalidInputError

from ..options import NEW, TABLE, Choice, json_option, load_calibration
from ..output import print_json

CALIBRATION = "calibration"


@click.command()
@click.argument("source", metavar="IN", type=TABLE)
@click.argument("target", metavar="OUT", type=NEW)
@click.option(
    "--from",
    "source_format",
    type=Choice([*FORMATS, CALIBRATION], "formats"),
    help="Format of IN.  [default: detected]",
)
@click.option("--to", "target_format", type=Choice(FORMATS, "formats"), help="Format of OUT.  [default: by its suffix]")
@json_option
def convert(source: Path, target: Path, source_format: str | None, target_format: str | None, as_json: bool) -> None:
    """Convert a calibration table to another format.

    IN is a TensorRT calibration cache, an onnxruntime table, an ncnn table, JSON, CSV, or a klquant calibration, whose
    current thresholds are converted. The suffixes .cache and .json fit several formats: use --to with them.

    \b
    Example:
      klquant convert calib.npz model.cache --to tensorrt
      klquant convert model.cache scales.csv
      klquant convert old_table scales.json --from ncnn --to json
    """  # noqa: D301
    thresholds = read_thresholds(source, source_format)
    write_table(target, thresholds, format=target_format)
    if as_json:
        print_json({"out": target, "thresholds": thresholds})
    else:
        click.echo(f"wrote {len(thresholds)} thresholds to {target}")


def read_thresholds(path: Path, table_format: str | None = None) -> Mapping[str, float]:
    """Return T by tensor, from a table or a klquant calibration."""
    if table_format != CALIBRATION and not (table_format is None and is_zipfile(path)):
        thresholds: Mapping[str, float] = read_table(path, format=table_format)
    else:
        thresholds = {name: found.threshold for name, found in load_calibration(path).thresholds.items()}
    if not thresholds:
        raise InvalidInputError(f"`{path}` must contain the scale of at least one tensor, got none")
    return thresholds
