"""Argument checks: shapes and dtypes always, values only if they are concrete (not while JAX traces).

Where a value is traced and bad, results are NaN: kernels ask :func:`is_sound`.
"""

import functools
import math
import numbers
import operator
from types import ModuleType
from typing import Any

import numpy as np

from klquant._namespace import Array, array_namespace, compiled, in_float64, is_array, is_concrete
from klquant.errors import ArrayTypeError, InvalidInputError

SMALLEST, LARGEST = 1e-140, 1e140  # of the last edge: squared errors of other ranges would leave the range of float64
MAX_TOTAL = 2.0**63 * (1 - 2.0**-40)  # the margin covers the rounding of a float64 sum


MIN_TOTAL = 1e-30  # of weights: the powers of smaller ones would leave the range of float64
MAX_DRIFT = 1e-2  # of bins that count as equal, from their mean width
MAX_LEVELS = 2**32 - 1
INT8_LEVELS = 255


def check_real(name: str, array: Array) -> None:
    """Raise ArrayTypeError unless the dtype is an integer or floating-point type."""
    if np.dtype(array.dtype).kind not in "iu" and not is_floating(array.dtype):
        raise ArrayTypeError(f"`{name}` must hold real numbers, got dtype {array.dtype}")


def is_floating(dtype: Any) -> bool:
    """Return whether klquant computes with this floating-point type. It does not with those of 8 bits or less."""
    return bool(dtype.itemsize > 1 and (dtype.kind == "f" or dtype.name == "bfloat16"))


def check_int(name: str, value: Any) -> int:
    """Return `value` as an int, or raise ArrayTypeError if it is another type."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise ArrayTypeError(f"`{name}` must be an int, got {type(value).__name__}")
    number: int = operator.index(value)
    return number


def check_axis(name: str, array: Array, axis: Any) -> int:
    """Return the axis of the array, counted from the first, or raise an error if there is no such axis."""
    if not -array.ndim <= check_int("axis", axis) < array.ndim:
        raise InvalidInputError(f"`axis` must be an axis of `{name}`, got {axis} for shape {tuple(array.shape)}")
    if array.shape[int(axis)] == 0:
        raise InvalidInputError(f"`{name}` must have a slice along axis {axis}, got shape {tuple(array.shape)}")
    return int(int(axis) % array.ndim)


def check_flag(name: str, value: Any) -> bool:
    """Return `value` as a bool, or raise ArrayTypeError if it is another type."""
    if not isinstance(value, (bool, np.bool_)):
        raise ArrayTypeError(f"`{name}` must be True or False, got {type(value).__name__}")
    return bool(value)


def check_odd(name: str, value: int, minimum: int = 3) -> None:
    """Raise an error unless `value` is an odd int of at least `minimum`."""
    check_int(name, value)
    if value < minimum or value % 2 == 0:
        raise InvalidInputError(f"`{name}` must be odd and at least {minimum}, got {value}")


def check_levels(num_quantized_bins: int | None, num_bits: int | None = None, most: int = MAX_LEVELS) -> int:
    """Return the number of levels: ``2**num_bits - 1`` if `num_bits` is given, 255 if neither is."""
    if num_bits is not None:
        if num_quantized_bins is not None:
            raise InvalidInputError(
                f"`num_quantized_bins` and `num_bits` must not both be given, got {num_quantized_bins} and {num_bits}"
            )
        if not 2 <= check_int("num_bits", num_bits) <= 32:
            raise InvalidInputError(f"`num_bits` must be from 2 to 32, got {num_bits}")
        num_quantized_bins = 2 ** int(num_bits) - 1
    levels = INT8_LEVELS if num_quantized_bins is None else num_quantized_bins
    check_odd("num_quantized_bins", levels)
    if levels > most:
        raise InvalidInputError(f"`num_quantized_bins` must be at most {most}, got {levels}")
    return int(levels)


def check_number(name: str, value: Any) -> Any:
    """Return a real number as a float, and a traced JAX scalar as it is."""
    if is_array(value):
        array_namespace(**{name: value})  # no masked array
    if is_array(value) and value.shape == () and value.dtype.kind != "b":
        check_real(name, value)
        return float(value) if is_concrete(value) else value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        shape = f" of shape {np.shape(value)}" if is_array(value) else ""
        raise ArrayTypeError(f"`{name}` must be a real number, got {type(value).__name__}{shape}")
    try:
        return float(value)
    except OverflowError:
        return math.copysign(math.inf, 1 if value > 0 else -1)  # type: ignore[operator]


def check_positive(name: str, value: Any) -> Any:
    """Return a positive finite number as a float, or a traced JAX scalar."""
    number = check_number(name, value)
    if is_concrete(number) and not (np.isfinite(number) and number > 0):
        raise InvalidInputError(f"`{name}` must be positive and finite, got {value}")
    return number


def check_vector(name: str, array: Array) -> None:
    """Raise an error unless the array is one-dimensional, not empty and real, with finite entries >= 0."""
    check_real(name, array)
    if array.ndim != 1 or array.shape[0] == 0:
        raise InvalidInputError(f"`{name}` must be one-dimensional and not empty, got shape {tuple(array.shape)}")
    if is_concrete(array):
        _check_counts(name, np.asarray(array))


def is_sound(hist: Array, *edges: Array, xp: ModuleType) -> Array:
    """Return whether one histogram has valid counts and edges. The checks cannot see values that JAX traces."""
    if xp is np:
        return np.True_  # these were checked
    total = xp.where(hist >= 0, hist.astype(xp.float64), xp.nan).sum()
    sound = (total <= 2.0**63) & ((total == 0) | (total >= MIN_TOTAL) | (len(edges) == 0))
    return functools.reduce(operator.and_, [_are_valid(bounds, xp=xp) for bounds in edges], sound)


def _are_valid(edges: Array, *, xp: ModuleType) -> Array:
    """Return whether these edges are finite, increasing, symmetric and within the range; NaN makes a minimum NaN."""
    bounds = in_float64(edges, xp=xp)
    in_range = (bounds[-1] >= SMALLEST) & (bounds[-1] <= LARGEST)
    return in_range & ((bounds[1:] - bounds[:-1]).min() > 0) & (_excess_skew(edges, xp=xp).max() <= 0)


def _excess_skew(edges: Array, *, xp: ModuleType) -> Array:
    """Return how much farther each edge is from the mirrored one than rounding allows.

    linspace and cumsum are off by a few roundings; a millionth of a bin does not change the threshold.
    """
    precision = np.finfo(edges.dtype).eps if edges.dtype.kind == "f" else 0.0
    edges = in_float64(edges, xp=xp)
    narrowest = (edges[..., 1:] - edges[..., :-1]).min(axis=-1)
    allowed = xp.maximum(1e-6 * narrowest, 8 * precision * edges[..., -1])
    return xp.abs(edges + edges[..., ::-1]) - allowed[..., None]


@compiled
def without_zeros(hist: Array, *, xp: ModuleType) -> Array:
    """Return the histograms with empty centre bins."""
    centre = xp.arange(hist.shape[-1]) == hist.shape[-1] // 2
    return xp.where(centre, xp.zeros((), hist.dtype), hist)


def check_inputs(
    hist: Array,
    edges: Array,
    num_quantized_bins: int | None,
    num_bits: int | None,
    skip_zeros: bool,
    *,
    fewest: int | None = None,
) -> tuple[Array, int]:
    """Check what all criteria take; return the histograms, without the zeros if wanted, and the number of levels."""
    array_namespace(hist=hist, edges=edges)
    levels = check_levels(num_quantized_bins, num_bits)
    check_histogram(hist, edges, levels, fewest=fewest)
    return (without_zeros(hist) if check_flag("skip_zeros", skip_zeros) else hist), levels


def check_histogram(hist: Array, edges: Array, num_quantized_bins: int, *, fewest: int | None = None) -> ModuleType:
    """Check histograms, their edges and the number of levels, and return the namespace.

    `fewest` is the smallest number of bins. By default it is that of the levels.
    """
    xp = array_namespace(hist=hist, edges=edges)
    check_odd("num_quantized_bins", num_quantized_bins)
    check_real("hist", hist)
    check_real("edges", edges)
    if hist.ndim == 0 or 0 in hist.shape:
        raise InvalidInputError(f"`hist` must have shape (..., num_bins) and not be empty, got {tuple(hist.shape)}")
    *batch, num_bins = hist.shape
    if num_bins % 2 == 0:
        raise InvalidInputError(f"`hist` must have an odd number of bins, got {num_bins}")
    if num_bins < (fewest or num_quantized_bins):
        least = fewest or f"num_quantized_bins = {num_quantized_bins}"
        raise InvalidInputError(f"`hist` must have at least {least} bins, got {num_bins}")
    if edges.shape not in {(num_bins + 1,), (*batch, num_bins + 1)}:
        raise InvalidInputError(
            f"`edges` must have shape ({num_bins + 1},), one more than `hist`, got {tuple(edges.shape)}"
        )
    if is_concrete(hist):
        totals = _check_counts("hist", np.asarray(hist))
        small = totals[(totals > 0) & (totals < MIN_TOTAL)]
        if small.size:
            raise InvalidInputError(f"`hist` must have a total of 0 or at least {MIN_TOTAL}, got {small[0]}")
    if is_concrete(edges):
        _check_edges(np.asarray(edges))
    return xp


def check_counted(name: str, hist: Array, edges: Array) -> None:
    """Check the arrays of a histogram that was counted elsewhere: dtypes, shapes, and counts if they are known."""
    check_real(f"{name}.hist", hist)
    check_real(f"{name}.edges", edges)
    if hist.ndim == 0 or edges.shape not in {(hist.shape[-1] + 1,), (*hist.shape[:-1], hist.shape[-1] + 1)}:
        raise InvalidInputError(
            f"`{name}` must have one edge more than bins, got {tuple(edges.shape)} for {tuple(hist.shape)}"
        )
    if is_concrete(hist) and hist.size:
        _check_counts(f"{name}.hist", np.asarray(hist))


def check_equal_bins(edges: Array, what: str) -> None:
    """Raise InvalidInputError unless all bins have nearly the same width; `what` needs that."""
    if is_concrete(edges):
        drift = _drift(np.asarray(edges), xp=np)
        if drift > MAX_DRIFT:
            raise InvalidInputError(
                f"`edges` must be equally spaced for {what}, got widths up to {drift:.1%} off the mean"
            )


def has_equal_bins(edges: Array, *, xp: ModuleType) -> Array:
    """Return whether all bins have nearly the same width, for edges that JAX may trace."""
    return np.True_ if xp is np else _drift(edges, xp=xp) <= MAX_DRIFT


def _drift(edges: Array, *, xp: ModuleType) -> Array:
    bounds = in_float64(edges, xp=xp)
    widths = (bounds[..., 1:] - bounds[..., :-1]) * (bounds.shape[-1] - 1)
    return xp.abs(widths / (bounds[..., -1:] - bounds[..., :1]) - 1).max()


def _check_counts(name: str, counts: "np.ndarray[Any, Any]") -> Any:
    for what, wrong in (("be finite", ~np.isfinite(counts)), ("not be negative", counts < 0)):
        if wrong.any():
            where = np.unravel_index(np.argmax(wrong), counts.shape)
            raise InvalidInputError(f"`{name}` must {what}, got {counts[where]} at index {_index(where)}")
    totals = counts.sum(axis=-1, dtype=np.float64).reshape(-1)
    total = totals.max()
    if total >= MAX_TOTAL and (counts.dtype.kind == "f" or _exact_total(counts, totals) >= 2**63):
        raise InvalidInputError(f"`{name}` must have a total below 2**63, got about {total:.4g}")
    return totals


def _exact_total(counts: "np.ndarray[Any, Any]", totals: "np.ndarray[Any, Any]") -> int:
    return sum(counts.reshape(len(totals), -1)[int(np.argmax(totals))].tolist())


def _index(where: Any) -> Any:
    return int(where[0]) if len(where) == 1 else tuple(map(int, where))


def _check_edges(edges: "np.ndarray[Any, Any]") -> None:
    given, edges = edges, edges.astype(np.float64, copy=False)
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
        excess = _excess_skew(given, xp=np)
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
