"""Calibration tables in the formats of engines and other tools.

:func:`read_table` and :func:`write_table` handle every format in :data:`FORMATS`, each a :class:`Format`. Functions for
one format: :func:`read_tensorrt_cache`, :func:`write_tensorrt_cache`; :func:`read_onnxruntime_table`,
:func:`write_onnxruntime_table`; :func:`read_onnxruntime_text`, :func:`write_onnxruntime_text`;
:func:`read_ncnn_table`, :func:`write_ncnn_table`; :func:`read_json`, :func:`write_json`; :func:`read_csv`,
:func:`write_csv`. The complete content of a file is in :class:`CalibrationCache` (TensorRT) and :class:`NcnnTable`.

A table maps tensor names to thresholds T > 0, in units of the tensor, for INT8: scale = T / 127.

=====================  ==================  ======================================================================
format                 suffixes            precision of T
=====================  ==================  ======================================================================
``tensorrt``           .cache              float32 of T / 127; scales of TensorRT stay bit-identical
``onnxruntime``        .json               float32 of T
``onnxruntime-text``   .cache              exact
``ncnn``               .table              float32 of 127 / T; names are of layers, without spaces
``json``, ``csv``      .json, .csv         exact
=====================  ==================  ======================================================================

Each format that rounds changes T by up to 6e-8 of its value.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from klquant.errors import InvalidInputError

from ..plugins import load
from ..settings import check_choice
from .json_csv import read_csv, read_json, write_csv, write_json
from .ncnn_table import NcnnTable, read_ncnn_table, write_ncnn_table
from .onnxruntime_table import (
    read_onnxruntime_table,
    read_onnxruntime_text,
    write_onnxruntime_table,
    write_onnxruntime_text,
)
from .parsing import PathLike, parse_json, read_text
from .tensorrt_cache import CalibrationCache, read_tensorrt_cache, write_tensorrt_cache

__all__ = [
    "FORMATS",
    "CalibrationCache",
    "Format",
    "NcnnTable",
    "read_csv",
    "read_json",
    "read_ncnn_table",
    "read_onnxruntime_table",
    "read_onnxruntime_text",
    "read_table",
    "read_tensorrt_cache",
    "write_csv",
    "write_json",
    "write_ncnn_table",
    "write_onnxruntime_table",
    "write_onnxruntime_text",
    "write_table",
    "write_tensorrt_cache",
]


def __dir__() -> list[str]:
    return __all__


class Format(NamedTuple):
    """The functions that read and write one format."""

    suffix: str
    """Usual suffix of its files."""
    read: Callable[[PathLike], dict[str, float]]
    write: Callable[[PathLike, Mapping[str, float]], None]


FormatName: TypeAlias = Literal["tensorrt", "onnxruntime", "onnxruntime-text", "ncnn", "json", "csv"]
FORMATS: Mapping[FormatName, Format] = {
    "tensorrt": Format(".cache", read_tensorrt_cache, write_tensorrt_cache),
    "onnxruntime": Format(".json", read_onnxruntime_table, write_onnxruntime_table),
    "onnxruntime-text": Format(".cache", read_onnxruntime_text, write_onnxruntime_text),
    "ncnn": Format(".table", read_ncnn_table, write_ncnn_table),
    "json": Format(".json", read_json, write_json),
    "csv": Format(".csv", read_csv, write_csv),
}
_CSV_HEADER = re.compile(r'"?(tensor|threshold)"?,')


def read_table(path: PathLike, *, format: FormatName | None = None) -> dict[str, float]:  # noqa: A002
    """Read thresholds from a table of any format.

    Parameters
    ----------
    path : str or Path
    format : {"tensorrt", "onnxruntime", "onnxruntime-text", "ncnn", "json", "csv"}, optional
        By default it is detected from the content, and from the suffix if the content is ambiguous.

    Returns
    -------
    dict
        T by tensor name.

    Raises
    ------
    InvalidInputError
        For an unknown or ambiguous format, and as the function of the format. A missing file is a FileNotFoundError.

    Warns
    -----
    CalibrationWarning
        Naming the tensors for which another tool wrote no usable scale (0, inf), which are left out.
    """
    return _format(_recognize(path) if format is None else format).read(path)


def write_table(
    path: PathLike,
    thresholds: Mapping[str, float],
    *,
    format: FormatName | None = None,  # noqa: A002
) -> None:
    """Write thresholds as a table of any format. The file is written whole or not at all.

    Parameters
    ----------
    path : str or Path
    thresholds : mapping
        T > 0 by tensor name, in units of the tensor.
    format : {"tensorrt", "onnxruntime", "onnxruntime-text", "ncnn", "json", "csv"}, optional
        By default it follows from the suffix; .json and .cache are ambiguous.

    Raises
    ------
    InvalidInputError
        For an unknown or ambiguous format, a T that is not positive and finite, or a name or scale that the format
        cannot represent. The message names the tensor.
    """
    _format(_of_suffix(path, list(FORMATS)) if format is None else format).write(path, thresholds)


def _format(name: FormatName) -> Format:
    check_choice("format", name, FORMATS, "formats")
    found: Format = FORMATS[name] if name in FORMATS else load("formats", name)
    return found


def _recognize(path: PathLike) -> FormatName:
    """Return the format of a file by its content, or by its suffix if the content is ambiguous."""
    text = read_text(path)
    start = text.lstrip()
    if start.startswith("TRT-"):
        return "tensorrt"
    if start.startswith("{") or Path(path).suffix.lower() == ".json":
        return "json" if isinstance(parse_json(path, text).get("klquant"), str) else "onnxruntime"
    if _CSV_HEADER.match(start):
        return "csv"
    return _of_suffix(path, ["onnxruntime-text", "ncnn", "csv"])


def _of_suffix(path: PathLike, names: Iterable[FormatName]) -> FormatName:
    """Return the one of these formats that has the suffix of this file."""
    suffix = Path(path).suffix.lower()
    found = [name for name in names if FORMATS[name].suffix == suffix]
    if len(found) != 1:
        raise InvalidInputError(f"`format` must be given for `{path}`: it could be any of {', '.join(found or names)}")
    return found[0]
