"""What a file may say: each part of it is looked at before it is used, and refused by a ValueError that names it."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

import klquant

from .settings import CRITERIA, MAX_BINS

Array: TypeAlias = "np.ndarray[Any, Any]"
MAX_KEYS = 16
CHOSEN_BY = (*CRITERIA, "fixed", "none")


def check_text(value: Any) -> str:
    """Return a text that can be written as UTF-8."""
    if not isinstance(value, str) or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"names and reasons must be Unicode text, got {value!r:.80}")
    return value


def check_texts(given: Any) -> dict[str, str]:
    """Return texts by name."""
    return {check_text(name): check_text(value) for name, value in given.items()}


def check_names(given: Any) -> list[str]:
    """Return names that are different."""
    names = [check_text(name) for name in given]
    if len(set(names)) < len(names):
        raise ValueError("every name must stand once")
    return names


def check_number(value: Any, smallest: int = 0) -> int:
    """Return a whole number that int64 can hold."""
    if not isinstance(value, int) or isinstance(value, bool) or not smallest <= value < 2**63:
        raise ValueError(f"a number must be whole and at least {smallest}, got {value!r:.80}")
    return value


def check_floats(array: Array, shape: tuple[int, ...]) -> Array:
    """Return float64 of this shape; -1 stands for any length."""
    fits = len(array.shape) == len(shape) and all(n in (-1, m) for n, m in zip(shape, array.shape, strict=True))
    if array.dtype != np.float64 or not fits:
        raise ValueError(f"float64 of shape {shape} is needed, got {array.dtype} of shape {array.shape}")
    return array


def check_positives(array: Array, shape: tuple[int, ...]) -> list[Any]:
    """Return finite numbers that are not negative, as a list."""
    if not ((check_floats(array, shape) >= 0) & (array < np.inf)).all():
        raise ValueError(
            f"numbers must be finite and not negative, got {array[~((array >= 0) & (array < np.inf))][:5]}"
        )
    return list(array.tolist())


def check_ranges(array: Array, number: int) -> list[tuple[float, float]]:
    """Return so many pairs of a smallest and a largest value."""
    lows, highs = check_floats(array, (number, 2)).T
    if not ((-np.inf < lows) & (lows <= highs) & (highs < np.inf)).all():
        raise ValueError("ranges must be finite, the smallest value first")
    return list(zip(lows.tolist(), highs.tolist(), strict=True))


def check_counts(hist: Array) -> Array:
    """Return the counts of a histogram; with one pass there may be three times as many bins as were asked for."""
    if hist.ndim != 1 or hist.dtype != np.int64 or not 3 <= len(hist) <= 3 * MAX_BINS:
        raise ValueError(f"a histogram needs int64 counts of 3 to {3 * MAX_BINS} bins, got {hist.dtype} {hist.shape}")
    if hist.min() < 0 or not 0 < hist.sum(dtype=np.float64) < 2.0**63:
        raise ValueError("counts must not be negative, and have a total above 0 and below 2**63")
    return hist


def read_histogram(hist: Array, amax: float) -> klquant.Histogram:
    """Return the histogram with the edges that klquant gives to this range."""
    empty = klquant.histogram(np.zeros(0), num_bins=len(check_counts(hist)), amax=amax)
    return klquant.Histogram(hist, empty.edges)


def check_chosen(criterion: Any, num_bits: Any) -> tuple[str, int]:
    """Return how a threshold was chosen."""
    if criterion not in CHOSEN_BY or not 2 <= check_number(num_bits) <= 16:
        raise ValueError(
            f"a threshold must be by one of {', '.join(CHOSEN_BY)} for 2 to 16 bits, got {criterion!r:.80}"
        )
    return criterion, num_bits


def check_transforms(given: Any) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each stage: flat, and of few columns."""
    for stage, rows in given.items():
        check_text(stage)
        if not isinstance(rows, list) or len({key for row in rows for key in _check_row(row)}) > MAX_KEYS:
            raise ValueError(f"stage {stage!r:.80} must have rows of {MAX_KEYS} columns at most")
    return dict(given)


def _check_row(row: Any) -> Mapping[str, Any]:
    for key, value in row.items():
        check_text(key)
        if not (value is None or isinstance(value, bool | int | float)):
            check_text(value)
    return row  # type: ignore[no-any-return]
