"""Products in INT8: rounding of both operands, and the product in integers or of what the integers stand for."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..thresholds import LayerThreshold
from .model.interpretation import bind
from .model.sites import Site

Form: TypeAlias = Literal["int8", "simulate"]
INT8_BITS = 8
_TINY = float(np.finfo(np.float32).tiny)  # a scale of 0 would mark a dead channel


class Levels(NamedTuple):
    """An operand in integers."""

    levels: Any
    scale: Any
    """float32 with as many axes as the operand, of length 1 where one scale serves all."""

    @property
    def values(self) -> Any:
        """Return what the integers stand for."""
        return self.levels.astype(self.scale.dtype) * self.scale + 0.0  # + 0.0: INT8 has no negative zero


def qmax(num_bits: int) -> int:
    """Return the highest level: 127 for 8 bits."""
    return int(2 ** (num_bits - 1) - 1)


def contracted(site: Site, operand: int) -> tuple[int, ...]:
    """Return the axes of an operand that a product sums over."""
    numbers = site.equation.params["dimension_numbers"]
    if site.primitive == "dot_general":
        return tuple(numbers[0][operand])
    if operand == 0:
        return ()
    return tuple(axis for axis in range(len(numbers.rhs_spec)) if axis != numbers.rhs_spec[0])


def terms(site: Site) -> int:
    """Return how many products an output of a site sums up."""
    return int(np.prod([site.equation.invars[1].aval.shape[axis] for axis in contracted(site, 1)], dtype=np.int64))


def quantize_weight(site: Site, weight: Any, num_bits: int, dead_channel: float) -> Levels:
    """Return a weight in integers, with one scale per output channel: ``max |w_c| / 127``.

    A scale of 0 marks a dead channel, which becomes 0. The first axes of a weight may be those of scans.
    """
    first = len(site.varies)
    axes = tuple(first + axis for axis in contracted(site, site.weight or 0))
    wide = weight.astype(jnp.promote_types(weight.dtype, jnp.float32))
    amax = jnp.abs(wide).max(axis=axes, keepdims=True).astype(jnp.float32)
    alive = (amax > 0) & (amax >= dead_channel)
    scale = jnp.where(alive, jnp.maximum(amax / qmax(num_bits), _TINY), 0.0)
    return Levels(round_to_levels(wide, scale, num_bits), scale)


def round_to_levels(x: Any, scale: Any, num_bits: int) -> Any:
    """Return ``clip(round_half_even(x / scale), -127, 127)`` as integers; 0 where the scale is 0."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    steps = jnp.asarray(scale).astype(wide.dtype)
    found = jnp.round(wide / jnp.where(steps > 0, steps, 1))
    found = jnp.where(steps > 0, jnp.clip(found, -qmax(num_bits), qmax(num_bits)), 0)
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


def quantize_activation(x: Any, scale: float, num_bits: int) -> Levels:
    """Return an activation in integers, with one scale."""
    return Levels(round_to_levels(x, np.float32(scale), num_bits), jnp.full((1,) * x.ndim, scale, jnp.float32))


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def fake_quantize(x: Any, scale: Any, num_bits: int) -> Any:
    """Return what the levels of `x` stand for, in its dtype. The gradient passes where `x` is not clipped."""
    levels = round_to_levels(x, scale, num_bits)
    return Levels(levels, jnp.asarray(scale, jnp.float32)).values.astype(x.dtype)


@fake_quantize.defjvp
def _straight_through(num_bits: int, primals: Any, tangents: Any) -> Any:
    (x, scale), (tangent, _) = primals, tangents
    passes = jnp.abs(x) <= jnp.asarray(scale, x.dtype) * (qmax(num_bits) + 0.5)  # a weight of amax is not clipped
    return fake_quantize(x, scale, num_bits), jnp.where(passes, tangent, 0)


def rounded_operands(
    site: Site, operands: Sequence[Any], thresholds: Mapping[str, LayerThreshold], dead_channel: float
) -> list[Any]:
    """Return what the levels of both operands stand for, with gradients; a weight is rounded as it is passed."""
    layers = {k: thresholds[name] for k, name in site.tensors.items()}
    values = list(operands)
    for k, layer in layers.items():
        values[k] = fake_quantize(operands[k], np.float32(layer.scale), layer.num_bits)
    if site.weight is not None:
        bits = layers[1 - site.weight].num_bits
        once = site._replace(varies=frozenset())  # in a scan this is the weight of one iteration
        scale = lax.stop_gradient(quantize_weight(once, operands[site.weight], bits, dead_channel).scale)
        values[site.weight] = fake_quantize(operands[site.weight], scale, bits)
    return values


def multiply(site: Site, operands: Sequence[Levels]) -> Any:
    """Return the product, computed in integers: INT8 operands and an INT32 sum, then one scaling.

    The levels of the operands are :func:`arranged`.
    """
    left, right = (operand.levels for operand in operands)
    total = _PRODUCTS[site.primitive](left, right, site.equation.params)
    dtype = site.equation.outvars[0].aval.dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    left_scale, right_scale = (_to_output(site, k, operand.scale) for k, operand in enumerate(operands))
    return (total.astype(wide) * (left_scale * right_scale).astype(wide)).astype(dtype)


def multiply_simulated(site: Site, operands: Sequence[Any]) -> Any:
    """Return the product of values, in floating point."""
    given = [x.astype(v.aval.dtype) for x, v in zip(operands, site.equation.invars, strict=True)]
    return bind(site.equation, given)[0]


def _dot(left: Any, right: Any, params: Any) -> Any:
    options = {} if params.get("out_sharding") is None else {"out_sharding": params["out_sharding"]}
    return lax.dot_general(left, right, params["dimension_numbers"], preferred_element_type=jnp.int32, **options)


def _conv(left: Any, right: Any, params: Any) -> Any:
    out = params["dimension_numbers"].out_spec
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "feature_group_count")
    total = lax.conv_general_dilated(
        left,
        right,
        **{name: params[name] for name in names},
        dimension_numbers=_channels_last(left.ndim),
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
