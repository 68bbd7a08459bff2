"""Tables of scales as engines and other tools read and write them.

:func:`read_table` and :func:`write_table` take every format in :data:`FORMATS`, each a :class:`Format`. Single formats:
:func:`read_tensorrt_cache`, :func:`write_tensorrt_cache`; :func:`read_onnxruntime_table`,
:func:`write_onnxruntime_table`; :func:`read_onnxruntime_text`, :func:`write_onnxruntime_text`;
:func:`read_ncnn_table`, :func:`write_ncnn_table`; :func:`read_json`, :func:`write_json`; :func:`read_csv`,
:func:`write_csv`. All that stands in a file is in :class:`CalibrationCache` (TensorRT) and :class:`NcnnTable`.

A table maps tensor names to thresholds T > 0, in units of the tensor, for INT8: scale = T / 127.

=====================  ==================  ======================================================================
format                 suffixes            what is kept of T
=====================  ==================  ======================================================================
``tensorrt``           .cache              float32 of T / 127: TensorRT's scales survive bit for bit
``onnxruntime``        .json               float32 of T
``onnxruntime-text``   .cache              all of it
``ncnn``               .table              float32 of 127 / T; the names are of layers, without blanks
``json``, ``csv``      .json, .csv         all of it
=====================  ==================  ======================================================================

From one format that rounds to another T moves by up to 6e-8 of itself for each of them.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from klquant.errors import InvalidInputError

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
    """How one kind of table is read and written."""

    suffix: str
    """What files of this kind usually end in."""
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
        Told from the content, and where that leaves a choice from the suffix, if it is not given.

    Returns
    -------
    dict
        T by tensor name.

    Raises
    ------
    InvalidInputError
        For another format, a file that could be of several, and what the format's own function raises. A missing file
        is a FileNotFoundError.

    Warns
    -----
    CalibrationWarning
        For a TensorRT cache with tensors of scale 0, which are left out.
    """
    return _format(_recognize(path) if format is None else format).read(path)


def write_table(
    path: PathLike,
    thresholds: Mapping[str, float],
    *,
    format: FormatName | None = None,  # noqa: A002
) -> None:
    """Write thresholds as a table of any format, whole or not at all.

    Parameters
    ----------
    path : str or Path
    thresholds : mapping
        T > 0 by tensor name, in units of the tensor.
    format : {"tensorrt", "onnxruntime", "onnxruntime-text", "ncnn", "json", "csv"}, optional
        Told from the suffix if it is not given; .json and .cache leave a choice.

    Raises
    ------
    InvalidInputError
        For another format, a suffix of none or of several, a T that is not positive and finite, a name or a scale that
        the format cannot hold; naming the tensor.
    """
    _format(_of_suffix(path, list(FORMATS)) if format is None else format).write(path, thresholds)


def _format(name: FormatName) -> Format:
    if name not in FORMATS:
        raise InvalidInputError(f"`format` must be one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]


def _recognize(path: PathLike) -> FormatName:
    """Return the format of a file."""
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
    """Return which of these formats a file is named for."""
    suffix = Path(path).suffix.lower()
    found = [name for name in names if FORMATS[name].suffix == suffix]
    if len(found) != 1:
        raise InvalidInputError(f"`format` must be given for `{path}`: it may be any of {', '.join(found or names)}")
    return found[0]
