"""onnxruntime's calibration tables: ranges of tensors as JSON, and the text file written with it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from klquant.errors import InvalidInputError

from ..files import write_atomic
from ..settings import check_choice
from .parsing import (
    LINE_ENDS,
    PathLike,
    check_thresholds,
    is_number,
    malformed,
    numbered_lines,
    parse_json,
    printed_number,
    read_text,
    to_float32,
    unique,
    usable,
)

Method: TypeAlias = Literal["MinMax", "Entropy", "Percentile", "Distribution"]
METHODS: tuple[Method, ...] = get_args(Method)
_TEXT = "an onnxruntime calibration.cache"


def read_onnxruntime_table(path: PathLike) -> dict[str, float]:
    """Read thresholds from onnxruntime's JSON.

    Parameters
    ----------
    path : str or Path
        The cache of `quantize_static(calibration_cache_path=...)`, calibration.json of `write_calibration_table`, or
        the older form ``{name: [lowest, highest]}``.

    Returns
    -------
    dict
        T = max(abs(lowest), abs(highest)) by tensor name.

    Raises
    ------
    InvalidInputError
        For another document, a tensor with one range per channel, without a range, or whose range is reversed. It names
        the tensor.

    Warns
    -----
    CalibrationWarning
        Naming the tensors whose range is only 0 or has no end, which are left out.
    """
    document = parse_json(path, read_text(path))
    tensors = document.get("data") if document.get("CLS") == "TensorsData" else document
    if not isinstance(tensors, dict):
        raise InvalidInputError(f"`{path}`: `data` must be an object of tensors, got {type(tensors).__name__}")
    found = {name: _threshold(path, name, entry) for name, entry in tensors.items()}
    return check_thresholds(f"`{path}`", usable(f"`{path}`", found))


def write_onnxruntime_table(path: PathLike, thresholds: Mapping[str, float], *, method: Method = "Entropy") -> None:
    """Write thresholds as the JSON cache that `quantize_static(calibration_cache_path=...)` reads.

    Parameters
    ----------
    path : str or Path
    thresholds : mapping
        T > 0 by tensor name; the range becomes [-T, T].
    method : {"Entropy", "MinMax", "Percentile", "Distribution"}
        The method to pass as ``calibrate_method=CalibrationMethod.Entropy``; onnxruntime rejects caches of others.

    Raises
    ------
    InvalidInputError
        For another method, and a T that is not positive and finite or overflows float32. It names the tensor.

    Notes
    -----
    Ranges are float32, as in onnxruntime, which changes T by up to 6e-8 of its value. onnxruntime uses scale T / 127
    only with ``extra_options={"ActivationSymmetric": True}`` and int8 activations. Because these ranges include
    negative values, it removes each Relu as redundant, unless ``"QDQKeepRemovableActivations": True`` is set. It also
    needs the range of the input of a Relu, which calibrations of klquant do not have: use the range of the output.
    :func:`klquant.backends.onnx.quantize` needs none of this.
    """
    check_choice("method", method, METHODS)
    checked = check_thresholds("an onnxruntime calibration table", thresholds)
    document = {
        "CLS": "TensorsData",
        "data": {name: _tensor_data(name, threshold) for name, threshold in checked.items()},
        "calibration_method": {"CLS": "CalibrationMethod", "value": f"CalibrationMethod.{method}"},
        "smooth_quant": False,
    }
    write_atomic(Path(path), json.dumps(document, allow_nan=False).encode())


def read_onnxruntime_text(path: PathLike) -> dict[str, float]:
    """Read thresholds from calibration.cache of `write_calibration_table`, which has ``name T`` per line.

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
        For another form of line, a duplicate name, or a T that is not a number. It names file and line.

    Warns
    -----
    CalibrationWarning
        Naming the tensors whose T is 0 or infinite, which are left out.

    Notes
    -----
    onnxruntime 1.32 writes the highest value, not the largest absolute value. For a tensor whose lowest value is
    further from 0, T is too small, and the file does not show it. Prefer the JSON, which has both ends of the range.
    """
    lines = numbered_lines(read_text(path))
    found = unique(path, (_parse(path, number, line) for number, line in lines))
    return check_thresholds(f"`{path}`", usable(f"`{path}`", found), LINE_ENDS)


def write_onnxruntime_text(path: PathLike, thresholds: Mapping[str, float]) -> None:
    """Write thresholds as ``name T`` per line, with all digits of T.

    Parameters
    ----------
    path : str or Path
    thresholds : mapping
        T > 0 by tensor name.

    Raises
    ------
    InvalidInputError
        For a name with a line break or a final colon, and a T that is not positive and finite. It names the tensor.

    Notes
    -----
    T is kept exactly. onnxruntime itself does not read this file: its TensorRT provider reads a TensorRT cache
    (``klquant.backends.formats.write_tensorrt_cache``) or a FlatBuffers file of the same ranges, which only
    onnxruntime's `write_calibration_table` writes.
    """
    checked = check_thresholds(_TEXT, thresholds, LINE_ENDS)
    for name in checked:
        if name.endswith(":"):
            raise InvalidInputError(f"{_TEXT} must have names without a final colon, got {name!r}")
    write_atomic(Path(path), "".join(f"{name} {threshold!r}\n" for name, threshold in checked.items()).encode())


def _parse(path: PathLike, number: int, line: str) -> tuple[int, str, float]:
    name, separator, value = line.rpartition(" ")
    if not separator or not name:
        raise malformed(path, number, "a name, a space and T", line)
    if name.endswith(":"):  # digits of a TensorRT cache without its header could pass for a decimal number
        raise malformed(path, number, "a name without a final colon, a space and T", line)
    if not is_number(value):
        raise malformed(path, number, f"a number as T for tensor {name!r}", value)
    return number, name, printed_number(value)


def _tensor_data(name: str, threshold: float) -> dict[str, Any]:
    largest = to_float32("an onnxruntime calibration table", name, threshold)
    ends = {"lowest": -largest, "highest": largest}
    arrays = {key: {"data": value, "dtype": "float32", "CLS": "numpy.array"} for key, value in ends.items()}
    return {**arrays, "CLS": "TensorData"}


def _threshold(path: PathLike, name: str, entry: Any) -> float:
    """Return the largest absolute value in a tensor's range."""
    if isinstance(entry, dict):
        entry = [entry.get("lowest"), entry.get("highest")]
    ends = [_number(value) for value in entry] if isinstance(entry, list) else []
    if len(ends) != 2 or None in ends:
        raise InvalidInputError(
            f"`{path}`: tensor {name!r} must have `lowest` and `highest`, one number each; "
            "ranges per channel and other statistics have no threshold"
        )
    lowest, highest = (float(end) for end in ends if end is not None)
    if not lowest <= highest:
        raise InvalidInputError(f"`{path}`: tensor {name!r} must have a range, got [{lowest}, {highest}]")
    return max(-lowest, highest)


def _number(value: Any) -> float | None:
    """Return a number given as such, as an array of one element, or as onnxruntime writes a NumPy array."""
    if isinstance(value, dict) and value.get("CLS") == "numpy.array":
        value = value.get("data")
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, float) else None
