"""Symmetric affine quantization: scale, quantize, dequantize, fake_quantize.

``q = clamp(round_half_even(x / scale), -qmax, qmax)`` and ``x_hat = q * scale``, with zero point 0 and
``qmax = num_quantized_bins // 2``. INT8 has the levels -127 .. 127; -128 is not used.
"""

from types import ModuleType
from typing import Any

import numpy as np

from klquant._namespace import Array, array_namespace, compiled, from_numpy, in_float64, is_array, is_concrete
from klquant._result import Threshold
from klquant._validate import MAX_LEVELS, check_int, check_levels, check_number, check_real, is_floating
from klquant.errors import ArrayTypeError, InvalidInputError

LIFT = 64  # the exponent of the factor of a subnormal scale
WIDE_ENOUGH = "float16, bfloat16 and wider types are accepted"


def scale(
    threshold: Array | Threshold | float, *, num_quantized_bins: int | None = None, num_bits: int | None = None
) -> Array | float:
    """Return the step between two quantized levels: ``threshold / 127`` for INT8.

    Parameters
    ----------
    threshold : float, Threshold, or array of any shape, in units of the activation
        The clipping value T. For weights it is the largest absolute value per channel. A T of 0 gives scale 0.
    num_quantized_bins : int, odd, at least 3
        255 by default.
    num_bits : int, 2 to 32
        In place of `num_quantized_bins`: ``2**num_bits - 1`` levels.

    Returns
    -------
    float or array, as `threshold`, or as the `value` of a Threshold
        Under ``jax.jit``, NaN for a negative threshold. On a CPU, XLA takes a subnormal result for 0.

    Raises
    ------
    InvalidInputError
        If the threshold is negative, NaN or infinite, or `num_quantized_bins` is even or below 3.
    ArrayTypeError
        If the threshold is neither a number nor a NumPy or JAX array of real numbers.

    Examples
    --------
    >>> import klquant
    >>> klquant.scale(254.0)
    2.0
    """
    qmax = check_levels(num_quantized_bins, num_bits) // 2
    threshold = threshold.value if isinstance(threshold, Threshold) else threshold
    if not _is_number(threshold):
        array_namespace(threshold=threshold)
        check_real("threshold", threshold)
    if is_concrete(threshold):
        _check_scale("threshold", threshold)
    if _is_number(threshold):
        return threshold / qmax
    return _scale(threshold, qmax=qmax)


def quantize(
    x: Array,
    scale: Array | float,
    *,
    axis: int | None = None,
    num_quantized_bins: int | None = None,
    num_bits: int | None = None,
) -> Array:
    """Round `x` to quantized levels: ``clamp(round_half_even(x / scale), -qmax, qmax)``.

    Parameters
    ----------
    x : array, any shape, floating point
        Infinity saturates.
    scale : float, or array of shape (x.shape[axis],) with `axis`
        Step between two levels, in units of `x`. Scale 0 marks a dead tensor or channel, whose levels are all 0.
    axis : int, optional
        Channel axis of `x`. By default the whole tensor has one scale.
    num_quantized_bins : int, odd, at least 3
        255 by default. At most ``2**25 + 1`` where the computation is in float32, and ``2**32 - 1`` in float64.
    num_bits : int, 2 to 32
        In place of `num_quantized_bins`: ``2**num_bits - 1`` levels.

    Returns
    -------
    array, shape of `x`, int8 (int16 or int32 if the levels need it), in the library of `x`
        Under ``jax.jit``, NaN becomes level 0, because integers have no NaN. So does everything where the scale is not
        valid.

    Raises
    ------
    InvalidInputError
        If `x` contains NaN, there are too many levels, or a scale is negative, not finite, does not fit `axis`, or
        would become 0 or infinite in the dtype of the computation.
    ArrayTypeError
        If `x` is not a NumPy or JAX array of floating-point numbers, or `scale` comes from a different library.

    Notes
    -----
    Computed in the dtype of `x`, but at least in float32. Under ``jax.jit`` on a CPU, XLA takes subnormal values of `x`
    for 0. A subnormal scale is not taken for 0. Under ``jax.jit`` XLA may also multiply by ``1 / scale``: a value at a
    rounding error from the middle of two levels may then go to the other one than outside.

    Examples
    --------
    >>> import numpy as np, klquant
    >>> klquant.quantize(np.array([-9.0, 0.25, 0.75, 1.0]), 0.5)
    array([-18,   0,   2,   2], dtype=int8)
    """
    steps, qmax = _check(x, scale, axis, num_quantized_bins, num_bits)
    return _quantize(x, steps, qmax=qmax)


def dequantize(q: Array, scale: Array | float, *, axis: int | None = None, dtype: Any = "float32") -> Array:
    """Return the real values of quantized levels: ``q * scale``.

    Parameters
    ----------
    q : array, any shape, integer
    scale : float, or array of shape (q.shape[axis],) with `axis`
        Step between two levels.
    axis : int, optional
        Channel axis of `q`. By default the whole tensor has one scale.
    dtype : dtype, or its name
        Floating-point dtype of the result, such as ``"float32"`` or ``np.float32``.

    Returns
    -------
    array, shape of `q`, `dtype`, in the library of `q`
        Under ``jax.jit``, NaN where a scale is not valid.

    Raises
    ------
    InvalidInputError
        If a scale is negative, not finite or does not fit `axis`.
    ArrayTypeError
        If `q` is not a NumPy or JAX array of integers, `dtype` is not floating point or, for JAX, not in native byte
        order, or `scale` comes from a different library.

    Examples
    --------
    >>> import numpy as np, klquant
    >>> klquant.dequantize(np.array([-127, 3], np.int8), 0.5)
    array([-63.5,   1.5], dtype=float32)
    """
    xp = array_namespace(q=q)
    if q.dtype.kind not in "iu":
        raise ArrayTypeError(f"`q` must hold integers, got dtype {q.dtype}")
    kind = _floating_dtype(dtype)
    if xp is not np and not kind.isnative:
        raise ArrayTypeError(f"`dtype` must be in native byte order for JAX, got {kind.str}")
    return _dequantize(q, _steps(q, scale, axis, _working_dtype(kind), xp=xp), dtype=kind)


def fake_quantize(
    x: Array,
    scale: Array | float,
    *,
    axis: int | None = None,
    num_quantized_bins: int | None = None,
    num_bits: int | None = None,
) -> Array:
    """Quantize and dequantize `x`: return the values that an INT8 engine would compute with, in the dtype of `x`.

    Parameters
    ----------
    x, scale, axis, num_quantized_bins, num_bits
        As for :func:`quantize`.

    Returns
    -------
    array, shape and dtype of `x`
        At most ``scale / 2`` away from `x` inside ``[-T, T]``, and T or -T outside. The function is monotone and
        idempotent. Under ``jax.jit``, NaN where `x` is NaN or a scale is not valid.

    Raises
    ------
    InvalidInputError, ArrayTypeError
        As for :func:`quantize`.

    Examples
    --------
    >>> import numpy as np, klquant
    >>> klquant.fake_quantize(np.array([-100.0, 0.3, 0.8]), 0.5)
    array([-63.5,   0.5,   1. ])
    """
    steps, qmax = _check(x, scale, axis, num_quantized_bins, num_bits)
    return _fake_quantize(x, steps, qmax=qmax)


@compiled
def _scale(threshold: Array, *, xp: ModuleType, qmax: int) -> Array:
    step = threshold / qmax
    return xp.where(threshold >= 0, step, xp.asarray(xp.nan, step.dtype))[()]


@compiled
def _quantize(x: Array, steps: Array, *, xp: ModuleType, qmax: int) -> Array:
    return _levels(x, steps, qmax, xp=xp)[()]


@compiled
def _dequantize(q: Array, steps: Array, *, xp: ModuleType, dtype: Any) -> Array:
    return _real_values(q, steps, dtype, xp=xp)


@compiled
def _fake_quantize(x: Array, steps: Array, *, xp: ModuleType, qmax: int) -> Array:
    real = _real_values(_levels(x, steps, qmax, xp=xp), steps, x.dtype, xp=xp)
    return xp.where(xp.isnan(x), x, real)[()]


def _levels(x: Array, steps: Array, qmax: int, *, xp: ModuleType) -> Array:
    wide = _working_dtype(x.dtype)
    narrow, lift = _lifted(steps, wide, xp=xp)
    scaled = x.astype(wide) if lift is None else x.astype(wide) * lift
    levels = xp.clip(xp.rint(scaled / xp.where(narrow > 0, narrow, 1)), -qmax, qmax)
    return xp.where(narrow > 0, levels, 0).astype(np.min_scalar_type(-qmax - 1))  # the smallest with -qmax .. qmax


def _real_values(q: Array, steps: Array, dtype: Any, *, xp: ModuleType) -> Array:
    steps = in_float64(steps, xp=xp)
    narrow, lift = _lifted(steps, _working_dtype(dtype), xp=xp)
    valid = (steps >= 0) & xp.isfinite(narrow) & ((narrow > 0) | (steps == 0))
    real = q.astype(narrow.dtype) * xp.where(valid, narrow, xp.asarray(xp.nan, narrow.dtype))
    return (real if lift is None else real / lift).astype(dtype)


def _lifted(steps: Array, dtype: str, *, xp: ModuleType) -> tuple[Array, Array | None]:
    """Return the scale in this dtype, but times a power of two if it is subnormal there; and that factor.

    On a CPU XLA computes with 0 in place of a subnormal number, and NumPy does not: it gets no factor.
    """
    exact = in_float64(steps, xp=xp).astype(xp.float64)
    if xp is np or dtype != "float32":
        return exact.astype(dtype), None
    small = exact < 2.0**-126
    rounded = xp.rint(exact * 2.0**149) * 2.0 ** (LIFT - 149)  # as in float32, but for the factor
    narrow = xp.where(small, rounded, exact).astype(dtype)
    return narrow, xp.where(small, 2.0**LIFT, 1.0).astype(dtype)


@compiled
def _count_nan(x: Array, *, xp: ModuleType) -> Array:
    return xp.isnan(x).sum()


def _check(
    x: Array, scale: Array | float, axis: int | None, num_quantized_bins: int | None, num_bits: int | None
) -> tuple[Array, int]:
    """Return the scale as an array that broadcasts, and the highest level."""
    xp = array_namespace(x=x)
    if not is_floating(x.dtype):
        raise ArrayTypeError(f"`x` must be floating point, got dtype {x.dtype}; {WIDE_ENOUGH}")
    wide = _working_dtype(x.dtype)
    levels = check_levels(num_quantized_bins, num_bits, MAX_LEVELS if wide == "float64" else 2**25 + 1)
    if is_concrete(x) and (bad := int(_count_nan(x))):
        raise InvalidInputError(f"`x` must not hold NaN, got {bad} of {x.size} values")
    return _steps(x, scale, axis, wide, xp=xp), levels // 2


def _floating_dtype(dtype: Any) -> Any:
    try:
        kind = None if dtype is None or is_array(dtype) else np.dtype(dtype)
    except TypeError as error:
        raise ArrayTypeError(f"`dtype` must be floating point, got {dtype!r}") from error
    if kind is None:
        raise ArrayTypeError(f"`dtype` must be floating point, got {type(dtype).__name__}")
    if not is_floating(kind):
        raise ArrayTypeError(f"`dtype` must be floating point, got {kind}; {WIDE_ENOUGH}")
    return kind


def _working_dtype(dtype: Any) -> str:
    return "float64" if dtype.itemsize > 4 else "float32"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _steps(x: Array, scale: Array | float, axis: int | None, wide: str, *, xp: ModuleType) -> Array:
    """Return the scale as an array that broadcasts along `axis` of `x`."""
    if _is_number(scale):
        steps = from_numpy(np.asarray(check_number("scale", scale)), xp=xp)
    else:
        array_namespace(x=x, scale=scale)
        check_real("scale", scale)
        steps = scale
    if is_concrete(steps):
        _check_scale("scale", scale, wide)
    if axis is None:
        if steps.ndim:
            raise InvalidInputError(
                f"`scale` must be a scalar when `axis` is not given, got shape {tuple(steps.shape)}"
            )
        return steps
    if not -x.ndim <= check_int("axis", axis) < x.ndim or steps.shape != (x.shape[axis],):
        raise InvalidInputError(
            f"`scale` must have shape (x.shape[axis],), got {tuple(steps.shape)} for {tuple(x.shape)} and axis {axis}"
        )
    return steps.reshape([-1 if k == axis % x.ndim else 1 for k in range(x.ndim)])


def _check_scale(name: str, value: Array | float, wide: str = "float64") -> None:
    numbers = np.asarray(check_number(name, value) if _is_number(value) else value, dtype=np.float64)
    if not (np.isfinite(numbers).all() and (numbers >= 0).all()):
        raise InvalidInputError(f"`{name}` must be finite and not negative, got {value}")
    with np.errstate(over="ignore", under="ignore"):
        narrow = numbers.astype(wide)
    lost = (numbers > 0) & ((narrow == 0) | np.isinf(narrow))
    if lost.any():
        raise InvalidInputError(f"`{name}` must be 0 or within the range of {wide}, got {numbers[lost].flat[0]}")
