"""Strict parsing of text. Every error names the file, the line or the tensor, and what was expected."""

import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from klquant.errors import InvalidInputError

from ..files import is_unicode, read_limited
from ..warning import warn

PathLike: TypeAlias = str | Path
Value = TypeVar("Value")
LINE_ENDS = "\n\r"
QMAX = 127  # quantized levels on each side of 0 in INT8: scale = T / 127
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_NOT_FINITE = re.compile(r"[+-]?(inf|infinity|nan)", re.ASCII | re.IGNORECASE)
_ON_WINDOWS = re.compile(r"([+-]?)(1\.#(INF|IND|[QS]NAN)0*|nan\((ind|snan)\))", re.ASCII | re.IGNORECASE)


def malformed(path: PathLike, line: int, expected: str, got: str) -> InvalidInputError:
    """Return the error for a line of a file that is not as expected."""
    return InvalidInputError(f"`{path}`, line {line}: must be {expected}, got {shown(got)}")


def shown(value: object) -> str:
    """Return a value from a file as a message shows it, shortened."""
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."


def read_text(path: PathLike) -> str:
    """Return the text of a file without a byte order mark. It must be UTF-8 without NUL, not blank, at most 16 MiB."""
    content = read_limited(Path(path))
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = error.object.count(b"\n", 0, error.start) + 1, error.object[error.start]
        raise malformed(path, line, "UTF-8 text", f"byte 0x{byte:02x}: {error.reason}") from error
    if "\0" in text:
        raise malformed(path, text.count("\n", 0, text.index("\0")) + 1, "text", "a NUL byte")
    if not text.strip():
        raise InvalidInputError(f"`{path}` must be a table of scales, got an empty file")
    return text


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield number and text of the lines that are not blank. Windows line ends are removed."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.removesuffix("\r")


def parse_json(path: PathLike, text: str) -> dict[str, Any]:
    """Return a JSON object. All numbers are floats, and keys must be unique."""
    try:
        document = json.loads(text, parse_int=float, object_pairs_hook=partial(_unique_keys, path))
    except json.JSONDecodeError as error:
        raise malformed(path, error.lineno, "JSON", f"{error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise InvalidInputError(f"`{path}` must be a table of scales, got JSON that is nested too deeply") from error
    if not isinstance(document, dict):
        raise malformed(path, 1, "a JSON object", text.lstrip())
    return document


def _unique_keys(path: PathLike, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise InvalidInputError(f"`{path}`: keys must be unique, got {shown(key)} twice")
        found[key] = value
    return found


def unique(path: PathLike, entries: Iterable[tuple[int, str, Value]]) -> dict[str, Value]:
    """Return the values by name, from entries of line number, name and value."""
    found: dict[str, Value] = {}
    lines: dict[str, int] = {}
    for line, name, value in entries:
        if name in found:
            raise malformed(path, line, f"a name that is not already in line {lines[name]}", name)
        found[name], lines[name] = value, line
    return found


def to_float(text: str) -> float:
    """Return a number written in ASCII decimal digits, or NaN for anything else."""
    return float(text) if _NUMBER.fullmatch(text) else math.nan


def is_number(text: str) -> bool:
    """Return whether C's printf may have written this: decimal digits, or what it calls infinity and NaN."""
    return any(pattern.fullmatch(text) for pattern in (_NUMBER, _NOT_FINITE, _ON_WINDOWS))


def printed_number(text: str) -> float:
    """Return what C's printf has written, perhaps on Windows."""
    if found := _ON_WINDOWS.fullmatch(text):
        return float(f"{found[1]}inf") if "INF" in text.upper() else math.nan
    return float(text)


def is_positive(value: object) -> bool:
    """Return whether this is a finite number above 0."""
    try:
        return isinstance(value, Real) and 0 < float(value) < math.inf
    except OverflowError:  # an int that overflows float
        return False


def name_problem(name: object, forbidden: str = "") -> str:
    """Return why a table cannot hold this name, or nothing if it can."""
    if not isinstance(name, str) or not is_unicode(name):
        return "is not Unicode text"
    bad = [character for character in "\0" + forbidden if character in name]
    return f"contains {bad[0]!r}" if bad else ""


def check_thresholds(source: str, thresholds: Mapping[str, Any], forbidden: str = "") -> dict[str, float]:
    """Return the thresholds as floats.

    Parameters
    ----------
    source : str
        Their file or format, for messages.
    thresholds : mapping
        T by tensor name; not checked yet.
    forbidden : str
        Characters that the format cannot write in a name. If there are any, names must not be empty either.

    Raises
    ------
    InvalidInputError
        For an empty table, a name that cannot be written, and a threshold that is not positive and finite. It names
        the tensor.
    """
    if not thresholds:
        raise InvalidInputError(f"{source} must have at least one tensor with a scale, got none")
    for name, threshold in thresholds.items():
        problem = name_problem(name, forbidden) or ("is empty" if forbidden and not name else "")
        if problem:
            raise InvalidInputError(f"{source} must have names that it can write, got {shown(name)}, which {problem}")
        if not is_positive(threshold):
            raise InvalidInputError(
                f"{source}: tensor {shown(name)} must have a positive, finite T, got {shown(threshold)}"
            )
    return {name: float(threshold) for name, threshold in thresholds.items()}


def usable(source: str, thresholds: Mapping[str, float]) -> dict[str, float]:
    """Return the thresholds that are positive and finite; warn of the others, which tools write where they saw only 0.

    Parameters
    ----------
    source : str
        What they belong to, for the messages.
    thresholds : mapping
        T by tensor name, as another tool wrote it.
    """
    without = {name: value for name, value in thresholds.items() if not is_positive(value)}
    if without:
        listed = ", ".join(f"`{name}` ({value})" for name, value in list(without.items())[:10])
        more = ", ..." if len(without) > 10 else ""
        warn(f"{len(without)} tensors of {source} have no usable scale and are left out: {listed}{more}")
    return {name: value for name, value in thresholds.items() if name not in without}


def to_float32(source: str, name: str, value: float) -> float:
    """Return the nearest float32. A value that overflows or becomes 0 is an error."""
    try:
        rounded: float = struct.unpack(">f", struct.pack(">f", value))[0]
    except OverflowError:
        rounded = math.inf
    if not is_positive(rounded):
        raise InvalidInputError(f"{source}: tensor {name!r} must have a value that float32 can hold, got {value!r}")
    return rounded
