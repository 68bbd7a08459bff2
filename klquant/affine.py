"""Symmetric affine quantization: scale, quantize, dequantize, fake_quantize.

``q = clamp(round_half_even(x / scale), -qmax, qmax)`` and ``x_hat = q * scale``, with zero point 0 and
``qmax = num_quantized_bins // 2``. INT8 has the levels -127 .. 127; -128 is not used.
"""

from types import ModuleType
from typing import Any

import numpy as np

from klquant._namespace import Array, array_namespace, compiled, from_numpy, is_concrete
from klquant._validate import check_odd, check_real
from klquant.errors import ArrayTypeError, InvalidInputError


def scale(threshold: Array | float, *, num_quantized_bins: int = 255) -> Array | float:
    """Return the step between two quantized levels: ``threshold / 127`` for INT8.

    Parameters
    ----------
    threshold : float or array of any shape, in units of the activation
        The clipping value T. For weights it is the largest absolute value per channel. A T of 0 gives scale 0.
    num_quantized_bins : int, odd, at least 3

    Returns
    -------
    float or array, as `threshold`

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
    check_odd("num_quantized_bins", num_quantized_bins)
    if not isinstance(threshold, (int, float)):
        array_namespace(threshold=threshold)
        check_real("threshold", threshold)
    if is_concrete(threshold):
        _check_scale("threshold", threshold)
    qmax = int(num_quantized_bins) // 2
    return threshold / qmax if isinstance(threshold, (int, float)) else _scale(threshold, qmax=qmax)


def quantize(x: Array, scale: Array | float, *, axis: int | None = None, num_quantized_bins: int = 255) -> Array:
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

    Returns
    -------
    array, shape of `x`, int8 (int16 or int32 if the levels need it), in the library of `x`

    Raises
    ------
    InvalidInputError
        If `x` contains NaN, or a scale is negative, not finite or does not fit `axis`.
    ArrayTypeError
        If `x` is not a NumPy or JAX array of floating-point numbers, or `scale` comes from a different library.

    Notes
    -----
    Computed in the dtype of `x`, but at least in float32.

    Examples
    --------
    >>> import numpy as np, klquant
    >>> klquant.quantize(np.array([-9.0, 0.25, 0.75, 1.0]), 0.5)
    array([-18,   0,   2,   2], dtype=int8)
    """
    check_odd("num_quantized_bins", num_quantized_bins)
    xp = array_namespace(x=x)
    if not _is_float(x.dtype):
        raise ArrayTypeError(f"`x` must be floating point, got dtype {x.dtype}")
    if is_concrete(x) and (bad := int(_count_nan(x))):
        raise InvalidInputError(f"`x` must not hold NaN, got {bad} of {x.size} values")
    return _quantize(x, _steps(x, scale, axis, xp=xp), qmax=int(num_quantized_bins) // 2)


def dequantize(q: Array, scale: Array | float, *, axis: int | None = None, dtype: str = "float32") -> Array:
    """Return the real values of quantized levels: ``q * scale``.

    Parameters
    ----------
    q : array, any shape, integer
    scale : float, or array of shape (q.shape[axis],) with `axis`
        Step between two levels.
    axis : int, optional
        Channel axis of `q`. By default the whole tensor has one scale.
    dtype : str
        Floating-point dtype of the result.

    Returns
    -------
    array, shape of `q`, `dtype`, in the library of `q`

    Raises
    ------
    InvalidInputError
        If a scale is negative, not finite or does not fit `axis`.
    ArrayTypeError
        If `q` is not a NumPy or JAX array of integers, `dtype` is not floating point, or `scale` comes from a different
        library.

    Examples
    --------
    >>> import numpy as np, klquant
    >>> klquant.dequantize(np.array([-127, 3], np.int8), 0.5)
    array([-63.5,   1.5], dtype=float32)
    """
    xp = array_namespace(q=q)
    if q.dtype.kind not in "iu":
        raise ArrayTypeError(f"`q` must hold integers, got dtype {q.dtype}")
    if not _is_float(dtype):
        raise ArrayTypeError(f"`dtype` must be floating point, got {dtype}")
    return _dequantize(q, _steps(q, scale, axis, xp=xp), dtype=str(dtype))


def fake_quantize(x: Array, scale: Array | float, *, axis: int | None = None, num_quantized_bins: int = 255) -> Array:
    """Quantize and dequantize `x`: return the values that an INT8 engine would compute with, in the dtype of `x`.

    Parameters
    ----------
    x, scale, axis, num_quantized_bins
        As for :func:`quantize`.

    Returns
    -------
    array, shape and dtype of `x`
        At most ``scale / 2`` away from `x` inside ``[-T, T]``, and T or -T outside. The function is monotone and
        idempotent.

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
    levels = quantize(x, scale, axis=axis, num_quantized_bins=num_quantized_bins)
    return dequantize(levels, scale, axis=axis, dtype=x.dtype)


@compiled
def _scale(threshold: Array, *, xp: ModuleType, qmax: int) -> Array:
    return threshold / qmax


@compiled
def _quantize(x: Array, steps: Array, *, xp: ModuleType, qmax: int) -> Array:
    wide = _working_dtype(x.dtype)
    steps = steps.astype(wide)
    levels = xp.clip(xp.rint(x.astype(wide) / xp.where(steps > 0, steps, 1)), -qmax, qmax)
    return xp.where(steps > 0, levels, 0).astype(np.min_scalar_type(-qmax - 1))  # the smallest with -qmax .. qmax


@compiled
def _dequantize(q: Array, steps: Array, *, xp: ModuleType, dtype: str) -> Array:
    wide = _working_dtype(xp.dtype(dtype))
    return (q.astype(wide) * steps.astype(wide)).astype(dtype)


@compiled
def _count_nan(x: Array, *, xp: ModuleType) -> Array:
    return xp.isnan(x).sum()


def _is_float(dtype: Any) -> bool:
    return str(dtype) == "bfloat16" or np.dtype(dtype).kind == "f"


def _working_dtype(dtype: Any) -> str:
    return "float64" if dtype.itemsize > 4 else "float32"


def _steps(x: Array, scale: Array | float, axis: int | None, *, xp: ModuleType) -> Array:
    """Return the scale as an array that broadcasts along `axis` of `x`."""
    if isinstance(scale, (int, float)):
        steps = from_numpy(np.asarray(scale, dtype=np.float64), xp=xp)
    else:
        array_namespace(x=x, scale=scale)
        check_real("scale", scale)
        steps = scale
    if is_concrete(steps):
        _check_scale("scale", scale)
    if axis is None:
        if steps.ndim:
            raise InvalidInputError(
                f"`scale` must be a scalar when `axis` is not given, got shape {tuple(steps.shape)}"
            )
        return steps
    if not -x.ndim <= axis < x.ndim or steps.shape != (x.shape[axis],):
        raise InvalidInputError(
            f"`scale` must have shape (x.shape[axis],), got {tuple(steps.shape)} for {tuple(x.shape)} and axis {axis}"
        )
    return steps.reshape([-1 if k == axis % x.ndim else 1 for k in range(x.ndim)])


def _check_scale(name: str, value: Array | float) -> None:
    numbers = np.asarray(value, dtype=np.float64)
    if not (np.isfinite(numbers).all() and (numbers >= 0).all()):
        raise InvalidInputError(f"`{name}` must be finite and not negative, got {value}")
