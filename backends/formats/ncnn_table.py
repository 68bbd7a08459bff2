"""ncnn's tables of int8 scales, from ncnn2table to ncnn2int8: lines ``layer scale`` and ``layer_param_0 scales``."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from klquant.errors import InvalidInputError

from ..files import write_atomic
from .parsing import (
    QMAX,
    PathLike,
    check_thresholds,
    is_number,
    malformed,
    name_problem,
    printed_number,
    read_text,
    to_float32,
    unique,
    usable,
)

_BLANKS = "\n\r \t\v\f"  # characters that end a word in C
_WEIGHT = "_param_"
_LONGEST = 255
_SOURCE = "an ncnn table"


class NcnnTable(NamedTuple):
    """The content of a table. Its scales are 127 / T, the inverse of scales in klquant."""

    weights: dict[str, tuple[float, ...]]
    """One scale per output channel, by ``<layer>_param_<k>``; infinity if all weights of the channel are 0."""
    activations: dict[str, float]
    """The scale of a layer's input, by the layer's name; infinity where the input was always 0."""

    @classmethod
    def load(cls, path: PathLike) -> "NcnnTable":
        """Read a table.

        Raises
        ------
        InvalidInputError
            For a line without a name and scales, a blank line before the end (ncnn stops there), a duplicate
            name, several scales for an activation, or a scale that is not a number. It names the file and the line.
        """
        lines = enumerate(read_text(path).rstrip(" \n\r").split("\n"), start=1)
        scales = unique(path, (_parse(path, number, line) for number, line in lines))
        weights = {name: values for name, values in scales.items() if _WEIGHT in name}
        return cls(weights, {name: values[0] for name, values in scales.items() if name not in weights})

    @classmethod
    def of(
        cls, thresholds: Mapping[str, float], *, weights: Mapping[str, Sequence[float]] | None = None
    ) -> "NcnnTable":
        """Return the table for these thresholds of activations and these scales of weights, in ncnn's units."""
        checked = check_thresholds(_SOURCE, thresholds, _BLANKS)
        scales = {name: to_float32(_SOURCE, name, QMAX / value) for name, value in checked.items()}
        return cls({name: tuple(values) for name, values in (weights or {}).items()}, scales)

    def thresholds(self) -> dict[str, float]:
        """Return T = 127 / scale of every activation."""
        return {name: QMAX / scale if scale else math.inf for name, scale in self.activations.items()}

    def save(self, path: PathLike) -> None:
        """Write the weights, then the activations, with nine digits, which represent a float32 exactly.

        Raises
        ------
        InvalidInputError
            For a name with spaces or over 255 bytes, ``_param_`` in the name of a layer, a name of weights without it,
            or a scale that is not positive.
        """
        lines = [_line(name, scales, weight=True) for name, scales in self.weights.items()]
        lines += [_line(name, [scale], weight=False) for name, scale in self.activations.items()]
        write_atomic(Path(path), "".join(lines).encode())


def read_ncnn_table(path: PathLike) -> dict[str, float]:
    """Read the thresholds of the activations from an ncnn table.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    dict
        T = 127 / scale of each layer's input, by layer. :class:`NcnnTable` also has the scales of weights.

    Raises
    ------
    InvalidInputError
        As :meth:`NcnnTable.load`, and for a table with weights only.

    Warns
    -----
    CalibrationWarning
        Naming the layers without a usable scale, which are left out: ncnn2table writes ``inf`` where all inputs were 0.
    """
    return check_thresholds(f"`{path}`", usable(f"`{path}`", NcnnTable.load(path).thresholds()), _BLANKS)


def write_ncnn_table(
    path: PathLike, thresholds: Mapping[str, float], *, weights: Mapping[str, Sequence[float]] | None = None
) -> None:
    """Write thresholds as an ncnn table. The file is written whole or not at all.

    Parameters
    ----------
    path : str or Path
    thresholds : mapping
        T > 0 by name of the layer, in units of its input.
    weights : mapping, optional
        ncnn's scales of weights by ``<layer>_param_<k>``, as in ``NcnnTable.load(path).weights``. ncnn2int8 fails for a
        layer with an activation scale but no weight scales.

    Raises
    ------
    InvalidInputError
        For a T that is not positive and finite, a scale that overflows float32, and as :meth:`NcnnTable.save`.

    Notes
    -----
    Scales are rounded to float32, which changes T by up to 6e-8 of its value. ncnn2table itself writes only six
    decimals. It gives weights of 3 x 3 convolutions with stride 1 the scale 31 / amax, because ncnn computes those with
    6 bits.
    Source: Tencent/ncnn, tools/quantize, `save_table` in ncnn2table.cpp, `read_int8scale_table` in ncnn2int8.cpp.
    """
    NcnnTable.of(thresholds, weights=weights).save(path)


def _parse(path: PathLike, number: int, line: str) -> tuple[int, str, tuple[float, ...]]:
    name, *words = [word for word in line.removesuffix("\r").split(" ") if word] or [""]
    problem = _name_problem(name)
    if problem or not words or (len(words) > 1 and _WEIGHT not in name):
        raise malformed(path, number, problem or "`layer scale` or `layer_param_0 scale ...`", line)
    for word in words:
        if not is_number(word):
            raise malformed(path, number, f"numbers as scales for {name!r}", word)
    values = [printed_number(word) for word in words]
    source = f"`{path}`, line {number}"
    return number, name, tuple(v if v == 0 or not math.isfinite(v) else _single(source, name, v) for v in values)


def _single(source: str, name: str, value: float) -> float:
    """Return the nearest float32, of either sign."""
    return math.copysign(to_float32(source, name, abs(value)), value)


def _line(name: str, scales: Sequence[float], *, weight: bool) -> str:
    problem = _name_problem(name)
    if not problem and (weight != (_WEIGHT in name) or not scales):
        problem = f"names with `{_WEIGHT}` for weights and only for them, each with scales"
    if problem:
        raise InvalidInputError(f"{_SOURCE} must have {problem}, got {name!r}: {scales!r}")
    return " ".join([name, *(f"{scale:.9g}" for scale in _float32(_SOURCE, name, scales))]) + "\n"


def _float32(source: str, name: str, scales: Sequence[float]) -> tuple[float, ...]:
    """Return scales as float32. Infinity is allowed for weights."""
    free = math.inf if _WEIGHT in name else None
    return tuple(scale if scale == free else to_float32(source, name, scale) for scale in scales)


def _name_problem(name: str) -> str:
    """Return what is required of a name, or nothing if the name is valid."""
    if not name or name_problem(name, _BLANKS):
        return "names that are not empty and have no spaces"
    return "" if len(name.encode()) <= _LONGEST else f"names of up to {_LONGEST} bytes"
