"""Argument checks: shape and dtype always, values only where they are concrete (not while JAX traces)."""

from types import ModuleType

import numpy as np

from klquant._namespace import Array, array_namespace, is_concrete
from klquant.errors import ArrayTypeError, InvalidInputError

MAX_TOTAL = 2**63 - 1


def check_real(name: str, array: Array) -> None:
    """Refuse arrays that hold no real numbers."""
    kind = np.dtype(array.dtype).kind
    if kind not in "iuf" and str(array.dtype) != "bfloat16":
        raise ArrayTypeError(f"`{name}` must hold real numbers, got dtype {array.dtype}")


def check_odd(name: str, value: int, minimum: int = 3) -> None:
    """Refuse all but odd integers of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ArrayTypeError(f"`{name}` must be an int, got {type(value).__name__}")
    if value < minimum or value % 2 == 0:
        raise InvalidInputError(f"`{name}` must be odd and at least {minimum}, got {value}")


def check_positive(name: str, value: float) -> None:
    """Refuse all but positive finite numbers."""
    if not (np.isfinite(value) and value > 0):
        raise InvalidInputError(f"`{name}` must be positive and finite, got {value}")


def check_vector(name: str, array: Array) -> None:
    """Refuse all but non-empty one-dimensional real arrays without NaN, infinity or negative entries."""
    check_real(name, array)
    if array.ndim != 1 or array.shape[0] == 0:
        raise InvalidInputError(f"`{name}` must be one-dimensional and not empty, got shape {tuple(array.shape)}")
    if is_concrete(array):
        _check_counts(name, np.asarray(array))


def check_histogram(hist: Array, edges: Array, num_quantized_bins: int) -> ModuleType:
    """Check a histogram with its edges and the number of levels; return the namespace."""
    xp = array_namespace(hist=hist, edges=edges)
    check_odd("num_quantized_bins", num_quantized_bins)
    check_vector("hist", hist)
    check_real("edges", edges)
    num_bins = hist.shape[0]
    if num_bins % 2 == 0:
        raise InvalidInputError(f"`hist` must have an odd number of bins, got {num_bins}")
    if num_bins < num_quantized_bins:
        raise InvalidInputError(
            f"`hist` must have at least num_quantized_bins = {num_quantized_bins} bins, got {num_bins}"
        )
    if edges.shape != (num_bins + 1,):
        raise InvalidInputError(
            f"`edges` must have shape ({num_bins + 1},), one more than `hist`, got {tuple(edges.shape)}"
        )
    if is_concrete(edges):
        _check_edges(np.asarray(edges))
    return xp


def _check_counts(name: str, counts: np.ndarray) -> None:
    if counts.dtype.kind in "iu":
        exact = int(counts.max()) * counts.size <= MAX_TOTAL or sum(counts.tolist()) <= MAX_TOTAL
    else:
        counts = counts.astype(np.float64)
        if not np.isfinite(counts).all():
            where = int(np.argmin(np.isfinite(counts)))
            raise InvalidInputError(f"`{name}` must be finite, got {counts[where]} at index {where}")
        exact = float(counts.sum()) < MAX_TOTAL
    if (counts < 0).any():
        where = int(np.argmax(counts < 0))
        raise InvalidInputError(f"`{name}` must not be negative, got {counts[where]} at index {where}")
    if not exact:
        raise InvalidInputError(
            f"`{name}` must have a total below 2**63, got about {float(counts.astype(np.float64).sum()):.4g}"
        )


def _check_edges(edges: np.ndarray) -> None:
    precision = np.finfo(edges.dtype).eps if edges.dtype.kind == "f" else 0.0
    edges = edges.astype(np.float64)
    widths = np.diff(edges)
    if not (np.isfinite(edges).all() and (widths > 0).all()):
        where = int(np.argmin(np.isfinite(widths) & (widths > 0)))
        raise InvalidInputError(
            f"`edges` must be finite and strictly increasing, got {edges[where]}, {edges[where + 1]} at index {where}"
        )
    skew = np.abs(edges + edges[::-1])
    # linspace and running sums are a few roundings off; a millionth of a bin moves no threshold
    if skew.max() > max(1e-6 * widths.min(), 8 * precision * edges[-1]):
        where = int(np.argmax(skew))
        raise InvalidInputError(
            f"`edges` must be symmetric about 0, got {edges[where]} and {edges[-1 - where]} at {where} from the ends"
        )
