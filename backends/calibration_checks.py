"""Checks of what a calibration file holds, which may come from anyone. Each raises a ValueError that names the part."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

import klquant

from .files import is_unicode
from .plugins import installed
from .settings import CRITERIA, MAX_BINS

Array: TypeAlias = "np.ndarray[Any, Any]"
MAX_KEYS = 16
CHOSEN_BY = (*CRITERIA, "fixed", "none")


def check_text(value: Any) -> str:
    """Return a name or a reason."""
    if not is_unicode(value):
        raise ValueError(f"names and reasons must be Unicode text, got {value!r:.80}")
    return str(value)


def check_texts(given: Any) -> dict[str, str]:
    """Return texts by name."""
    return {check_text(name): check_text(value) for name, value in given.items()}


def check_names(given: Any) -> list[str]:
    """Return names without duplicates."""
    names = [check_text(name) for name in given]
    if len(set(names)) < len(names):
        raise ValueError("names must be unique")
    return names


def check_number(value: Any) -> int:
    """Return a count that int64 can hold."""
    if not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"counts must be whole numbers from 0 to 2**63 - 1, got {value!r:.80}")
    return value


def check_floats(array: Array, shape: tuple[int, ...]) -> Array:
    """Return float64 values of this shape, in which -1 means any length."""
    fits = len(array.shape) == len(shape) and all(n in (-1, m) for n, m in zip(shape, array.shape, strict=True))
    if array.dtype != np.float64 or not fits:
        raise ValueError(f"expected float64 of shape {shape}, got {array.dtype} of shape {array.shape}")
    return array


def check_positives(array: Array, shape: tuple[int, ...]) -> list[Any]:
    """Return finite numbers from 0 on, as a list."""
    fine = (check_floats(array, shape) >= 0) & (array < np.inf)
    if not fine.all():
        raise ValueError(f"numbers must be finite and not negative, got {array[~fine][:5]}")
    return list(array.tolist())


def check_ranges(array: Array, number: int) -> list[tuple[float, float]]:
    """Return the smallest and the largest value of so many tensors."""
    lows, highs = check_floats(array, (number, 2)).T
    if not ((-np.inf < lows) & (lows <= highs) & (highs < np.inf)).all():
        raise ValueError("ranges must be finite, the smallest value first")
    return list(zip(lows.tolist(), highs.tolist(), strict=True))


def check_counts(hist: Array) -> Array:
    """Return the counts of a histogram. A single pass may leave three times the number of bins in the settings."""
    if hist.ndim != 1 or hist.dtype != np.int64 or len(hist) > 3 * MAX_BINS:
        raise ValueError(f"a histogram needs int64 counts of up to {3 * MAX_BINS} bins, got {hist.dtype} {hist.shape}")
    if hist.min() < 0 or not 0 < hist.sum(dtype=np.float64) < 2.0**63:
        raise ValueError("counts must not be negative, and their sum must be above 0 and below 2**63")
    return hist


def read_histogram(hist: Array, amax: float) -> klquant.Histogram:
    """Return the histogram with the edges that klquant gives to this range."""
    empty = klquant.histogram(np.zeros(0), num_bins=len(check_counts(hist)), amax=amax)
    return klquant.Histogram(hist, empty.edges)


def check_chosen(criterion: Any, num_bits: Any) -> tuple[str, int]:
    """Return how a threshold was chosen."""
    known = criterion in CHOSEN_BY or (isinstance(criterion, str) and criterion in installed("criteria"))
    if not known or not 2 <= check_number(num_bits) <= 16:
        raise ValueError(
            f"a threshold must be by one of {', '.join(CHOSEN_BY)} for 2 to 16 bits, got {criterion!r:.80}"
        )
    return criterion, num_bits


def check_replaced(criteria: Any, gains: Any, chosen: Any) -> dict[str, tuple[str, float]]:
    """Return the criterion that the guard replaced and the gain in dB, by name."""
    found = dict(zip(criteria, check_floats(np.zeros(0) if gains is None else gains, (len(criteria),)), strict=True))
    for name, gain in found.items():
        if name not in chosen or criteria[name] not in CRITERIA or not gain >= 0:
            raise ValueError(f"the guard must replace a known criterion with gain, got {criteria[name]!r:.80}: {gain}")
    return {name: (criteria[name], float(gain)) for name, gain in found.items()}


def check_transforms(given: Any) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each stage: few columns, and no nested values."""
    for stage, rows in given.items():
        check_text(stage)
        if len({key for row in rows for key in _check_row(row)}) > MAX_KEYS:
            raise ValueError(f"stage {stage!r:.80} must have at most {MAX_KEYS} columns")
    return dict(given)


def _check_row(row: Any) -> Mapping[str, Any]:
    for key, value in row.items():
        check_text(key)
        if not (value is None or isinstance(value, bool | int | float)):
            check_text(value)
    return row  # type: ignore[no-any-return]
