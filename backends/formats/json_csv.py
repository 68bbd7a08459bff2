"""klquant's own tables of thresholds, as JSON and CSV. They hold exact numbers.

Columns of the CSV, and keys of each tensor in the JSON:

``tensor``
    Name of the tensor; in JSON, its key under ``tensors``.
``threshold``
    T, in units of the tensor.
``scale``
    The INT8 step T / 127. Optional when a table is read, but it must agree with T.
``amax``
    Largest absolute value observed, if known.

Other columns and keys are ignored.
"""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from klquant.errors import InvalidInputError

from ..files import write_atomic
from .parsing import (
    QMAX,
    PathLike,
    check_thresholds,
    is_positive,
    malformed,
    parse_json,
    read_text,
    shown,
    to_float,
    unique,
)

KIND = "thresholds"
SCHEMA = 1
_AGREEMENT = 1e-6  # relative difference of T and scale; allows for a scale rounded to float32


def read_json(path: PathLike) -> dict[str, float]:
    """Read a table that :func:`write_json` wrote.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    dict
        T by tensor name.

    Raises
    ------
    InvalidInputError
        For another document or schema, a T that is not positive and finite, or a scale that is not T / 127.
    """
    document = parse_json(path, read_text(path))
    found = document.get("klquant"), document.get("schema")
    tensors = document.get("tensors")
    if found != (KIND, SCHEMA) or not isinstance(tensors, dict):
        raise InvalidInputError(f"`{path}` must be a klquant table of thresholds, schema {SCHEMA}, got {found}")
    return check_thresholds(f"`{path}`", {name: _threshold(f"`{path}`", name, row) for name, row in tensors.items()})


def write_json(path: PathLike, thresholds: Mapping[str, float], *, amax: Mapping[str, float] | None = None) -> None:
    """Write thresholds as JSON, ``{"klquant": "thresholds", "schema": 1, "tensors": {name: {"threshold": T, ...}}}``.

    Parameters
    ----------
    path : str or Path
    thresholds : mapping
        T > 0 by tensor name.
    amax : mapping, optional
        Largest absolute value by tensor name.

    Raises
    ------
    InvalidInputError
        For a T that is not positive and finite, or an amax that is negative or not finite. It names the tensor.
    """
    tensors = {str(row.pop("tensor")): row for row in _rows(thresholds, amax or {})}
    document = {"klquant": KIND, "schema": SCHEMA, "tensors": tensors}
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, indent=1)
    write_atomic(Path(path), f"{text}\n".encode())


def read_csv(path: PathLike) -> dict[str, float]:
    """Read a table whose header has the columns ``tensor`` and ``threshold``, in any order.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    dict
        T by tensor name.

    Raises
    ------
    InvalidInputError
        For another header, a row of another length, a duplicate name, a T that is not positive and finite, or a scale
        that is not T / 127. It names the file and the line.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        return check_thresholds(f"`{path}`", unique(path, _parse(path, reader)))
    except csv.Error as error:
        raise malformed(path, reader.line_num, "CSV", str(error)) from error


def write_csv(path: PathLike, thresholds: Mapping[str, float], *, amax: Mapping[str, float] | None = None) -> None:
    """Write thresholds as CSV with the columns ``tensor, threshold, scale`` and, if given, ``amax``.

    Parameters
    ----------
    path : str or Path
    thresholds : mapping
        T > 0 by tensor name.
    amax : mapping, optional
        Largest absolute value by tensor name.

    Raises
    ------
    InvalidInputError
        For a T that is not positive and finite, or an amax that is negative or not finite. It names the tensor.
    """
    columns = ["tensor", "threshold", "scale", *(["amax"] if amax else [])]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writeheader()
    writer.writerows(_rows(thresholds, amax or {}))
    write_atomic(Path(path), text.getvalue().encode())


def _rows(thresholds: Mapping[str, float], amax: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    """Yield the row of each tensor, after checks."""
    for name, threshold in check_thresholds("a table of thresholds", thresholds).items():
        row = {"tensor": name, "threshold": threshold, "scale": threshold / QMAX}
        if name in amax:
            if not is_positive(amax[name]) and amax[name] != 0:
                raise InvalidInputError(f"tensor {name!r} must have a finite amax of at least 0, got {amax[name]!r}")
            row["amax"] = float(amax[name])
        yield row


def _parse(path: PathLike, reader: Any) -> Iterator[tuple[int, str, float]]:
    """Yield line number, name and T of every row after the header."""
    header = next(reader)
    if not {"tensor", "threshold"} <= set(header) or len(set(header)) < len(header):
        raise malformed(path, reader.line_num, "a header with `tensor` and `threshold`", ",".join(header))
    for row in filter(None, reader):
        if len(row) != len(header):
            raise malformed(path, reader.line_num, f"a row of {len(header)} columns", ",".join(row))
        cells = dict(zip(header, row, strict=True))
        yield reader.line_num, cells["tensor"], _threshold(f"`{path}`, line {reader.line_num}", cells["tensor"], cells)


def _threshold(source: str, name: str, row: Any) -> float:
    """Return the T of a tensor, after checking that its scale agrees if there is one."""
    if not isinstance(row, dict) or "threshold" not in row:
        raise InvalidInputError(f"{source}: tensor {name!r} must have a threshold, got {shown(row)}")
    threshold = _number(row["threshold"])
    if not is_positive(threshold):
        got = shown(row["threshold"])
        raise InvalidInputError(f"{source}: tensor {name!r} must have a positive, finite threshold, got {got}")
    scale = threshold / QMAX
    if "scale" in row and not math.isclose(_number(row["scale"]), scale, rel_tol=_AGREEMENT):
        got = shown(row["scale"])
        raise InvalidInputError(f"{source}: tensor {name!r} must have scale T / 127 = {scale}, got {got}")
    return threshold


def _number(value: Any) -> float:
    return to_float(value) if isinstance(value, str) else value if isinstance(value, float) else math.nan
