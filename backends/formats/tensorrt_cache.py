"""TensorRT's calibration caches: a header, then a line ``name: 3c010a14`` for each tensor."""

import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from klquant.errors import InvalidInputError

from ..files import write_atomic
from .parsing import (
    LINE_ENDS,
    QMAX,
    PathLike,
    check_thresholds,
    malformed,
    name_problem,
    numbered_lines,
    read_text,
    to_float32,
    unique,
    usable,
)

HEADER = "TRT-8601-EntropyCalibration2"
_HEADER = re.compile(r"TRT-[\w.]+-\w+", re.ASCII)
_DIGITS = re.compile(r"[0-9a-fA-F]{1,8}")


class CalibrationCache(NamedTuple):
    """The content of a cache."""

    header: str
    """``TRT-<version>-<calibrator>``, such as ``TRT-8601-EntropyCalibration2``."""
    scales: dict[str, float]
    """T / 127 as float32 by tensor name, in the order of the file; 0 if TensorRT found no range."""

    @classmethod
    def load(cls, path: PathLike) -> "CalibrationCache":
        """Read a cache.

        Raises
        ------
        InvalidInputError
            For anything but a header and lines ``name: digits``, and a name that occurs twice; naming file and line.

        Notes
        -----
        A line is split at its last ``": "``: names may hold colons and blanks. Fewer than eight digits, line ends of
        Windows, blank lines, blanks at the end of a line and a missing last line end are read as well. A file as
        TensorRT writes it becomes the same bytes again by :meth:`save`.
        """
        (first, header), *lines = ((number, line.rstrip(" \t")) for number, line in numbered_lines(read_text(path)))
        if not _HEADER.fullmatch(header):
            raise malformed(path, first, "TRT-<version>-<calibrator>", header)
        return cls(header, unique(path, (_parse(path, number, line) for number, line in lines)))

    @classmethod
    def of(cls, thresholds: Mapping[str, float], *, header: str = HEADER) -> "CalibrationCache":
        """Return the cache for these thresholds, with T / 127 rounded to float32."""
        checked = check_thresholds("a TensorRT calibration cache", thresholds, LINE_ENDS)
        return cls(header, {name: _float32(name, value / QMAX) for name, value in checked.items()})

    def thresholds(self) -> dict[str, float]:
        """Return T = 127 * scale, exactly, for every tensor that has a scale.

        Warns
        -----
        CalibrationWarning
            Naming the tensors whose scale is not positive and finite, which are left out. TensorRT writes 0 where it
            found no range, mostly for constants and shapes, and runs what touches them in floating point.
        """
        return usable("the calibration cache", {name: scale * QMAX for name, scale in self.scales.items()})

    def save(self, path: PathLike) -> None:
        """Write the cache with eight digits per scale, and ``0`` for a scale of 0. The file is whole or absent.

        Raises
        ------
        InvalidInputError
            For a malformed header, a name with a line break, or a scale that float32 cannot represent.
        """
        if not _HEADER.fullmatch(self.header):
            raise InvalidInputError(f"`header` must be TRT-<version>-<calibrator>, got {self.header!r}")
        for name in self.scales:
            problem = name_problem(name, LINE_ENDS) or ("" if name else "is empty")
            if problem:
                raise InvalidInputError(f"a calibration cache cannot contain the name {name!r}, which {problem}")
        lines = [self.header, *(f"{name}: {_digits(name, scale)}" for name, scale in self.scales.items())]
        write_atomic(Path(path), "".join(line + "\n" for line in lines).encode())


def read_tensorrt_cache(path: PathLike) -> dict[str, float]:
    """Read the thresholds of a TensorRT calibration cache.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    dict
        T = 127 * scale by tensor name. Writing them again gives bit-identical scales.

    Raises
    ------
    InvalidInputError
        As :meth:`CalibrationCache.load`, and if no tensor has a scale.

    Warns
    -----
    CalibrationWarning
        Naming the tensors without a usable scale, which are left out.
    """
    return check_thresholds(f"`{path}`", CalibrationCache.load(path).thresholds(), LINE_ENDS)


def write_tensorrt_cache(path: PathLike, thresholds: Mapping[str, float], *, header: str = HEADER) -> None:
    """Write thresholds as a TensorRT calibration cache. The file is written whole or not at all.

    Parameters
    ----------
    path : str or Path
    thresholds : mapping
        T > 0 by tensor name, in units of the tensor.
    header : str
        TensorRT up to 10 ignores a cache of another version or calibrator; 8601 is TensorRT 8.6.1.

    Raises
    ------
    InvalidInputError
        For a name with a line break, a T that is not positive and finite, or a scale that overflows float32.

    Notes
    -----
    Scales are rounded to float32, which changes T by up to 6e-8 of its value. onnxruntime's TensorRT provider reads
    this file with `trt_int8_use_native_calibration_table`, but cuts names at their first colon.
    """
    CalibrationCache.of(thresholds, header=header).save(path)


def _parse(path: PathLike, number: int, line: str) -> tuple[int, str, float]:
    name, separator, digits = line.rpartition(": ")
    if not separator or not name or not _DIGITS.fullmatch(digits):
        raise malformed(path, number, "`name: ` and up to 8 hexadecimal digits", line)
    if name_problem(name, LINE_ENDS):
        raise malformed(path, number, "a name without line breaks", name)
    scale: float = struct.unpack(">f", bytes.fromhex(digits.zfill(8)))[0]
    return number, name, scale


def _digits(name: str, scale: float) -> str:
    return struct.pack(">f", _float32(name, scale)).hex() if scale != 0 else "0"


def _float32(name: str, scale: float) -> float:
    return to_float32("a TensorRT calibration cache", name, scale)
