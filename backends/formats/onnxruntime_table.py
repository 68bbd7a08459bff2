"""onnxruntime's calibration tables: ranges of tensors as JSON, and as the text file that lies beside it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from klquant.errors import InvalidInputError

from ..files import write_atomic
from .parsing import (
    LINE_ENDS,
    PathLike,
    check_thresholds,
    is_positive,
    malformed,
    numbered_lines,
    parse_json,
    read_text,
    to_float,
    to_float32,
    unique,
)

Method: TypeAlias = Literal["MinMax", "Entropy", "Percentile", "Distribution"]
METHODS: tuple[Method, ...] = get_args(Method)
_TEXT = "an onnxruntime calibration.cache"


def read_onnxruntime_table(path: PathLike) -> dict[str, float]:
    """Read thresholds from onnxruntime's JSON.

    Parameters
    ----------
    path : str or Path
        What `quantize_static(calibration_cache_path=...)` keeps, what `write_calibration_table` calls
        calibration.json, or the older ``{name: [lowest, highest]}``.

    Returns
    -------
    dict
        T = max(abs(lowest), abs(highest)) by tensor name.

    Raises
    ------
    InvalidInputError
        For another document, a tensor with one range per channel, without a range, or whose range is reversed, NaN,
        infinite or only 0; naming it.
    """
    document = parse_json(path, read_text(path))
    tensors = document.get("data") if document.get("CLS") == "TensorsData" else document
    if not isinstance(tensors, dict):
        raise InvalidInputError(f"`{path}`: `data` must be an object of tensors, got {type(tensors).__name__}")
    return check_thresholds(f"`{path}`", {name: _threshold(path, name, entry) for name, entry in tensors.items()})


def write_onnxruntime_table(path: PathLike, thresholds: Mapping[str, float], *, method: Method = "Entropy") -> None:
    """Write thresholds as the JSON that `quantize_static(calibration_cache_path=...)` takes for its calibration.

    Parameters
    ----------
    path : str or Path
    thresholds : mapping
        T > 0 by tensor name; the range becomes [-T, T].
    method : {"Entropy", "MinMax", "Percentile", "Distribution"}
        What to pass on as ``calibrate_method=CalibrationMethod.Entropy``: onnxruntime refuses a cache of another one.

    Raises
    ------
    InvalidInputError
        For another method, a T that is not positive and finite or beyond float32; naming the tensor.

    Notes
    -----
    Ranges are float32, as onnxruntime's own: T reads back within 6e-8 of itself. The scale that it makes of them is
    T / 127 only with ``extra_options={"ActivationSymmetric": True}`` and int8 activations. As these ranges reach below
    0, it takes a Relu for superfluous and drops it, unless told ``"QDQKeepRemovableActivations": True``; and it wants
    the range of what enters a Relu, which calibrations here have not: give that tensor the range of what leaves it.
    :func:`klquant.backends.onnx.quantize` needs none of this.
    """
    if method not in METHODS:
        raise InvalidInputError(f"`method` must be one of {', '.join(METHODS)}, got {method!r}")
    checked = check_thresholds("an onnxruntime calibration table", thresholds)
    document = {
        "CLS": "TensorsData",
        "data": {name: _tensor_data(name, threshold) for name, threshold in checked.items()},
        "calibration_method": {"CLS": "CalibrationMethod", "value": f"CalibrationMethod.{method}"},
        "smooth_quant": False,
    }
    write_atomic(Path(path), json.dumps(document, allow_nan=False).encode())


def read_onnxruntime_text(path: PathLike) -> dict[str, float]:
    """Read thresholds from the text that `write_calibration_table` calls calibration.cache: ``name T`` per line.

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
        For another form of line, a name that stands twice, a T that is not positive and finite; naming file and line.

    Notes
    -----
    onnxruntime (seen in 1.32) writes the highest value there, not the largest absolute one: for a tensor that reaches
    further below 0 than above, T is too small, and nothing in the file tells. Prefer the JSON, which has both ends.
    """
    lines = numbered_lines(read_text(path))
    found = unique(path, (_parse(path, number, line) for number, line in lines))
    return check_thresholds(f"`{path}`", found, LINE_ENDS)


def write_onnxruntime_text(path: PathLike, thresholds: Mapping[str, float]) -> None:
    """Write thresholds as ``name T`` per line, all digits of T.

    Parameters
    ----------
    path : str or Path
    thresholds : mapping
        T > 0 by tensor name.

    Raises
    ------
    InvalidInputError
        For a name with a line end or a last colon, a T that is not positive and finite; naming the tensor.

    Notes
    -----
    T reads back exactly. No part of onnxruntime reads this file: its TensorRT provider takes a TensorRT cache
    (``klquant.backends.formats.write_tensorrt_cache``) or a FlatBuffers file of the same ranges, which klquant leaves
    to onnxruntime's `write_calibration_table`.
    """
    checked = check_thresholds(_TEXT, thresholds, LINE_ENDS)
    for name in checked:
        if name.endswith(":"):
            raise InvalidInputError(f"{_TEXT} must hold names without a colon at their end, got {name!r}")
    write_atomic(Path(path), "".join(f"{name} {threshold!r}\n" for name, threshold in checked.items()).encode())


def _parse(path: PathLike, number: int, line: str) -> tuple[int, str, float]:
    name, separator, value = line.rpartition(" ")
    if not separator or not name:
        raise malformed(path, number, "a name, a blank and T", line)
    if name.endswith(":"):  # digits of a TensorRT cache without its header could pass for a decimal number
        raise malformed(path, number, "a name without a colon at its end, a blank and T", line)
    threshold = to_float(value)
    if not is_positive(threshold):
        raise malformed(path, number, f"a positive, finite T for tensor {name!r}", value)
    return number, name, threshold


def _tensor_data(name: str, threshold: float) -> dict[str, Any]:
    largest = to_float32("an onnxruntime calibration table", name, threshold)
    ends = {"lowest": -largest, "highest": largest}
    arrays = {key: {"data": value, "dtype": "float32", "CLS": "numpy.array"} for key, value in ends.items()}
    return {**arrays, "CLS": "TensorData"}


def _threshold(path: PathLike, name: str, entry: Any) -> float:
    """Return the larger end of one tensor's range, without its sign."""
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
    """Return a number that stands alone, in an array of one element, or in a NumPy array as onnxruntime writes it."""
    if isinstance(value, dict) and value.get("CLS") == "numpy.array":
        value = value.get("data")
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, float) else None
