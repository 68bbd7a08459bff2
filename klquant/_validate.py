"""Argument checks: shapes and dtypes always, values only if they are concrete (not while JAX traces)."""

from types import ModuleType
from typing import Any

import numpy as np

from klquant._namespace import Array, array_namespace, is_concrete
from klquant.errors import ArrayTypeError, InvalidInputError

SMALLEST, LARGEST = 1e-140, 1e140  # of the last edge: squared errors of other ranges would leave the range of float64
MAX_TOTAL = 2.0**63 * (1 - 2.0**-40)  # the margin covers the rounding of a float64 sum


def check_real(name: str, array: Array) -> None:
    """Raise ArrayTypeError unless the dtype is an integer or floating-point type."""
    kind = np.dtype(array.dtype).kind
    if kind not in "iuf" and str(array.dtype) != "bfloat16":
        raise ArrayTypeError(f"`{name}` must hold real numbers, got dtype {array.dtype}")


def check_odd(name: str, value: int, minimum: int = 3) -> None:
    """Raise an error unless `value` is an odd int of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ArrayTypeError(f"`{name}` must be an int, got {type(value).__name__}")
    if value < minimum or value % 2 == 0:
        raise InvalidInputError(f"`{name}` must be odd and at least {minimum}, got {value}")


def check_positive(name: str, value: float) -> None:
    """Raise InvalidInputError unless `value` is positive and finite."""
    if not (np.isfinite(value) and value > 0):
        raise InvalidInputError(f"`{name}` must be positive and finite, got {value}")


def check_vector(name: str, array: Array) -> None:
    """Raise an error unless the array is one-dimensional, not empty and real, with finite entries >= 0."""
    check_real(name, array)
    if array.ndim != 1 or array.shape[0] == 0:
        raise InvalidInputError(f"`{name}` must be one-dimensional and not empty, got shape {tuple(array.shape)}")
    if is_concrete(array):
        _check_counts(name, np.asarray(array))


def check_histogram(hist: Array, edges: Array, num_quantized_bins: int) -> ModuleType:
    """Check histograms, their edges and the number of levels, and return the namespace."""
    xp = array_namespace(hist=hist, edges=edges)
    check_odd("num_quantized_bins", num_quantized_bins)
    check_real("hist", hist)
    check_real("edges", edges)
    if hist.ndim == 0 or 0 in hist.shape:
        raise InvalidInputError(f"`hist` must have shape (..., num_bins) and not be empty, got {tuple(hist.shape)}")
    *batch, num_bins = hist.shape
    if num_bins % 2 == 0:
        raise InvalidInputError(f"`hist` must have an odd number of bins, got {num_bins}")
    if num_bins < num_quantized_bins:
        raise InvalidInputError(
            f"`hist` must have at least num_quantized_bins = {num_quantized_bins} bins, got {num_bins}"
        )
    if edges.shape not in {(num_bins + 1,), (*batch, num_bins + 1)}:
        raise InvalidInputError(
            f"`edges` must have shape ({num_bins + 1},), one more than `hist`, got {tuple(edges.shape)}"
        )
    if is_concrete(hist):
        _check_counts("hist", np.asarray(hist))
    if is_concrete(edges):
        _check_edges(np.asarray(edges))
    return xp


def check_equal_bins(edges: Array, what: str) -> None:
    """Raise InvalidInputError unless all bins have nearly the same width; `what` needs that."""
    if is_concrete(edges):
        bounds = np.asarray(edges, dtype=np.float64)
        drift = np.abs(np.diff(bounds) * (bounds.shape[-1] - 1) / (bounds[..., -1:] - bounds[..., :1]) - 1).max()
        if drift > 1e-2:
            raise InvalidInputError(
                f"`edges` must be equally spaced for {what}, got widths up to {drift:.1%} off the mean"
            )


def _check_counts(name: str, counts: "np.ndarray[Any, Any]") -> None:
    for what, wrong in (("be finite", ~np.isfinite(counts)), ("not be negative", counts < 0)):
        if wrong.any():
            where = np.unravel_index(np.argmax(wrong), counts.shape)
            raise InvalidInputError(f"`{name}` must {what}, got {counts[where]} at index {_index(where)}")
    totals = counts.sum(axis=-1, dtype=np.float64).reshape(-1)
    total = totals.max()
    if total >= MAX_TOTAL and (counts.dtype.kind == "f" or _exact_total(counts, totals) >= 2**63):
        raise InvalidInputError(f"`{name}` must have a total below 2**63, got about {total:.4g}")


def _exact_total(counts: "np.ndarray[Any, Any]", totals: "np.ndarray[Any, Any]") -> int:
    return sum(counts.reshape(len(totals), -1)[int(np.argmax(totals))].tolist())


def _index(where: Any) -> Any:
    return int(where[0]) if len(where) == 1 else tuple(map(int, where))


def _check_edges(edges: "np.ndarray[Any, Any]") -> None:
    precision = np.finfo(edges.dtype).eps if edges.dtype.kind == "f" else 0.0
    edges = edges.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        widths = np.diff(edges)
    steady = np.isfinite(widths) & (widths > 0)
    if not steady.all():
        where = np.unravel_index(np.argmin(steady), widths.shape)
        after = (*where[:-1], where[-1] + 1)
        raise InvalidInputError(
            f"`edges` must be finite and strictly increasing, got {edges[where]}, {edges[after]} "
            f"at index {_index(where)}"
        )
    with np.errstate(over="ignore"):
        skew = np.abs(edges + edges[..., ::-1])
    # linspace and cumsum are off by a few roundings; a millionth of a bin does not change the threshold
    allowed = np.maximum(1e-6 * widths.min(axis=-1), 8 * precision * edges[..., -1])
    excess = skew - allowed[..., None]
    if (excess > 0).any():
        where = np.unravel_index(np.argmax(excess), excess.shape)
        raise InvalidInputError(
            f"`edges` must be symmetric about 0, got {edges[where]} and {edges[..., ::-1][where]} at {_index(where)} "
            "from the ends"
        )
    outside = (edges[..., -1] < SMALLEST) | (edges[..., -1] > LARGEST)
    if outside.any():
        where = np.unravel_index(np.argmax(outside), outside.shape)
        raise InvalidInputError(f"`edges` must end between {SMALLEST} and {LARGEST}, got {edges[(*where, -1)]}")
