"""Products in INT8: rounding of both operands, and the product in integers or of what the integers stand for."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .grids import INT8_BITS, Grid
from .model.interpretation import bind
from .model.sites import Site, contracted, terms

Form: TypeAlias = Literal["int8", "simulate"]
TINY = float(np.finfo(np.float32).tiny)  # a scale of 0 would mark a dead channel


class Levels(NamedTuple):
    """An operand in integers."""

    levels: Any
    scale: Any
    """float32 with as many axes as the operand, of length 1 where one scale serves all."""
    sums: Any = None
    """Of the levels, over the axes that the product sums over; for the zero point of the other operand."""

    @property
    def values(self) -> Any:
        """Return what the integers stand for."""
        return self.levels.astype(self.scale.dtype) * self.scale + 0.0  # + 0.0: INT8 has no negative zero


def wide_dtype(dtype: Any) -> Any:
    """Return the dtype to compute in: float32, or float64 for float64, whatever promotion JAX is set to."""
    return np.float64 if dtype == np.float64 else np.float32


def qmax(num_bits: int) -> int:
    """Return the highest level: 127 for 8 bits."""
    return int(2 ** (num_bits - 1) - 1)


def quantize_weight(site: Site, weight: Any, num_bits: int, dead_channel: float) -> Levels:
    """Return a weight in integers, with one scale per output channel: ``max |w_c| / 127``.

    A scale of 0 marks a dead channel, which becomes 0. The first axes of a weight may be those of scans.
    """
    first = len(site.varies)
    axes = tuple(first + axis for axis in contracted(site, site.weight or 0))
    wide = weight.astype(wide_dtype(weight.dtype))
    amax = jnp.abs(wide).max(axis=axes, keepdims=True).astype(jnp.float32)
    alive = (amax > 0) & (amax >= dead_channel)
    scale = jnp.where(alive, jnp.maximum(amax / qmax(num_bits), TINY), 0.0)
    return Levels(round_to_levels(wide, scale, num_bits), scale)


def round_to_levels(x: Any, scale: Any, num_bits: int, zero_point: int = 0) -> Any:
    """Return ``clip(round_half_even(x / scale) + zero_point, lowest, highest)`` as integers; 0 where the scale is 0."""
    wide = x.astype(wide_dtype(x.dtype))
    steps = jnp.asarray(scale).astype(wide.dtype)
    found = jnp.round(wide / jnp.where(steps > 0, steps, 1)) + zero_point
    found = jnp.where(steps > 0, jnp.clip(found, *Grid(1.0, num_bits, zero_point).levels), 0)
    return found.astype(jnp.int8 if num_bits <= INT8_BITS else jnp.int16)


def arranged(site: Site, operand: int, x: Any) -> Any:
    """Return an operand with the axes in the order in which :func:`multiply` takes it; those of scans come first.

    XLA's kernels for convolutions of integers know only channels last. It makes a transposition of integers part of
    the convolution, which then has no kernel. So activations are transposed before they are rounded.
    """
    if site.primitive == "dot_general":
        return x
    numbers = site.equation.params["dimension_numbers"]
    spec = numbers.rhs_spec if operand == 1 else numbers.lhs_spec
    axes = (*spec[2:], spec[1], spec[0]) if operand == 1 else (spec[0], *spec[2:], spec[1])
    first = x.ndim - len(axes)
    return x.transpose(*range(first), *(first + axis for axis in axes))


def quantize_activation(x: Any, grid: Grid) -> Levels:
    """Return an activation in integers, with one scale."""
    levels = round_to_levels(x, np.float32(grid.scale), grid.num_bits, grid.zero_point)
    return Levels(levels, jnp.full((1,) * x.ndim, grid.scale, jnp.float32))


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def fake_quantize(x: Any, scale: Any, num_bits: int, zero_point: int = 0) -> Any:
    """Return what the levels of `x` stand for, in its dtype. The gradient passes where `x` is not clipped."""
    levels = round_to_levels(x, scale, num_bits, zero_point).astype(jnp.int16) - zero_point
    return Levels(levels, jnp.asarray(scale, jnp.float32)).values.astype(x.dtype)


@fake_quantize.defjvp
def _straight_through(num_bits: int, zero_point: int, primals: Any, tangents: Any) -> Any:
    (x, scale), (tangent, _) = primals, tangents
    low, high = (level - zero_point for level in Grid(1.0, num_bits, zero_point).levels)
    step = jnp.asarray(scale, x.dtype)
    passes = (x >= step * (low - 0.5)) & (x <= step * (high + 0.5))  # a weight of amax is not clipped
    return fake_quantize(x, scale, num_bits, zero_point), jnp.where(passes, tangent, 0)


def rounded_operands(site: Site, operands: Sequence[Any], grids: Mapping[str, Grid], dead_channel: float) -> list[Any]:
    """Return what the levels of both operands stand for, with gradients; a weight is rounded as it is passed."""
    chosen = {k: grids[name] for k, name in site.tensors.items()}
    values = list(operands)
    for k, grid in chosen.items():
        values[k] = fake_quantize(operands[k], np.float32(grid.scale), grid.num_bits, grid.zero_point)
    if site.weight is not None:
        bits = chosen[1 - site.weight].num_bits
        once = site._replace(varies=frozenset())  # in a scan this is the weight of one iteration
        scale = lax.stop_gradient(quantize_weight(once, operands[site.weight], bits, dead_channel).scale)
        values[site.weight] = fake_quantize(operands[site.weight], scale, bits)
    return values


def multiply(site: Site, operands: Sequence[Levels], zero_points: Sequence[int], shift: Any = None) -> Any:
    """Return the product, computed in integers: INT8 operands and an INT32 sum, then one scaling.

    The levels of the operands are :func:`arranged`. With zero points the sum of ``(a - z) (b - w)`` is that of ``a b``,
    without w times the sum of a and z times the sum of b, and with z w for each term. `shift` is added to the result.
    """
    left, right = (operand.levels for operand in operands)
    total = _PRODUCTS[site.primitive](left, right, site.equation.params, zero_points[0])
    for k, zero_point in enumerate(zero_points):
        if zero_point:
            total = total - zero_point * _to_output(site, 1 - k, level_sums(site, 1 - k, operands[1 - k]))
    if all(zero_points):
        total = total + terms(site) * zero_points[0] * zero_points[1]
    dtype = site.equation.outvars[0].aval.dtype
    wide = wide_dtype(dtype)
    left_scale, right_scale = (_to_output(site, k, operand.scale) for k, operand in enumerate(operands))
    result = total.astype(wide) * (left_scale * right_scale).astype(wide)
    return (result if shift is None else result + shift.astype(wide)).astype(dtype)


def level_sums(site: Site, operand: int, given: Levels) -> Any:
    """Return the sums of the levels of an operand over the axes that the product sums over; axes of scans stay."""
    if given.sums is not None:
        return given.sums
    ndim = site.equation.invars[operand].aval.ndim
    axes = contracted(site, operand) if site.primitive == "dot_general" else range(ndim - 1)  # arranged
    first = given.levels.ndim - ndim
    return given.levels.sum(axis=tuple(first + axis for axis in axes), keepdims=True, dtype=jnp.int32)


def shift_shape(site: Site) -> tuple[int, ...]:
    """Return the shape of the output with only the axes of the channels of the weight."""
    operand = site.weight or 0
    shape = site.equation.invars[operand].aval.shape
    channels = [1 if axis in contracted(site, operand) else size for axis, size in enumerate(shape)]
    found: tuple[int, ...] = _to_output(site, operand, np.empty(channels)).shape
    return found


def multiply_simulated(site: Site, operands: Sequence[Any]) -> Any:
    """Return the product of values, in floating point."""
    given = [x.astype(v.aval.dtype) for x, v in zip(operands, site.equation.invars, strict=True)]
    return bind(site.equation, given)[0]


def _dot(left: Any, right: Any, params: Any, zero_point: int) -> Any:
    options = {} if params.get("out_sharding") is None else {"out_sharding": params["out_sharding"]}
    return lax.dot_general(left, right, params["dimension_numbers"], preferred_element_type=jnp.int32, **options)


def _conv(left: Any, right: Any, params: Any, zero_point: int) -> Any:
    out = params["dimension_numbers"].out_spec
    given = {name: params[name] for name in ("window_strides", "padding", "lhs_dilation", "rhs_dilation")}
    if zero_point:  # the convolution itself would pad with level 0
        inner = [(*ends, hole - 1) for ends, hole in zip(given["padding"], given.pop("lhs_dilation"), strict=True)]
        left = lax.pad(left, np.int8(zero_point), [(0, 0, 0), *inner, (0, 0, 0)])
        given["padding"] = [(0, 0)] * len(inner)
    total = lax.conv_general_dilated(
        left,
        right,
        **given,
        dimension_numbers=_channels_last(left.ndim),
        feature_group_count=params["feature_group_count"],
        preferred_element_type=jnp.int32,
    )
    return total.transpose(np.argsort([out[0], *out[2:], out[1]]))


def _channels_last(ndim: int) -> lax.ConvDimensionNumbers:
    space = tuple(range(1, ndim - 1))
    image = (0, ndim - 1, *space)
    return lax.ConvDimensionNumbers(image, (ndim - 1, ndim - 2, *(axis - 1 for axis in space)), image)


_PRODUCTS = {"dot_general": _dot, "conv_general_dilated": _conv}


def _to_output(site: Site, operand: int, scale: Any) -> Any:
    """Return the scale of an operand in the axes of the product."""
    ndim, numbers = site.equation.outvars[0].aval.ndim, site.equation.params["dimension_numbers"]
    if scale.size == 1:
        return scale.reshape((1,) * ndim)
    if site.primitive == "conv_general_dilated":
        return scale.reshape([-1 if axis == numbers.out_spec[1] else 1 for axis in range(ndim)])
    contracting, batch = tuple(numbers[0][operand]), tuple(numbers[1][operand])
    free = tuple(axis for axis in range(scale.ndim) if axis not in (*contracting, *batch))
    ordered = scale.transpose(*batch, *free, *contracting).reshape([scale.shape[axis] for axis in (*batch, *free)])
    others = (1,) * (ndim - ordered.ndim)
    kept = ordered.shape[: len(batch)], ordered.shape[len(batch) :]
    return (
        ordered.reshape(*kept[0], *others, *kept[1]) if operand == 1 else ordered.reshape(*kept[0], *kept[1], *others)
    )
