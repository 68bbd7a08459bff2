"""``klquant convert``: from one table of scales to another."""

from collections.abc import Mapping
from pathlib import Path
from zipfile import is_zipfile

import click

from klquant.backends.formats import FORMATS, read_table, write_table
from klquant.errors import InvalidInputError

from ..options import NEW, TABLE, json_option, load_calibration
from ..output import print_json

CALIBRATION = "calibration"


@click.command()
@click.argument("source", metavar="IN", type=TABLE)
@click.argument("target", metavar="OUT", type=NEW)
@click.option("--from", "source_format", type=click.Choice([*FORMATS, CALIBRATION]), help="[default: told by the file]")
@click.option("--to", "target_format", type=click.Choice(list(FORMATS)), help="[default: told by the name of OUT]")
@json_option
def convert(source: Path, target: Path, source_format: str | None, target_format: str | None, as_json: bool) -> None:
    """Convert between the calibration tables of engines.

    IN is a TensorRT calibration cache, a table of onnxruntime, JSON, CSV, a table of ncnn, or a calibration of klquant,
    whose thresholds are taken as they were last searched. Names that end in .cache or .json fit several formats.

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
    """Return T by tensor from a table, or from a calibration of klquant."""
    if table_format != CALIBRATION and not (table_format is None and is_zipfile(path)):
        thresholds: Mapping[str, float] = read_table(path, format=table_format)
    else:
        thresholds = {name: found.threshold for name, found in load_calibration(path).thresholds.items()}
    if not thresholds:
        raise InvalidInputError(f"`{path}` must hold the scale of at least one tensor, got none")
    return thresholds
