"""Weights and biases as integers: one scale for each output channel, large enough that INT32 can hold the bias."""

from typing import Any, NamedTuple

import numpy as np
import onnx

import klquant
from klquant.errors import InvalidInputError

from ...settings import WEIGHTED
from ..model.graph import Graph, to_array
from ..model.operators import channel_bias, has_constant_weight, weight_axis

Array = np.ndarray[Any, Any]
MAX_BIAS = 2.0**30  # of a bias in INT32; the other half is for the sum of products
COARSE = 4  # that is two bits less
DEAD_SCALE = 1e-4 / 127  # of a channel of zeros without a bias: any positive scale will do


class Quantized(NamedTuple):
    """A constant as integers."""

    codes: Array
    """int8 or int32, in the shape of the constant."""
    scale: Array
    """Shape (channels,), or () where one scale holds for all values."""
    coarse: int = 0
    """How many channels have steps more than `COARSE` times as large as their weights need, to let the bias fit."""
    zero_point: int = 0


def quantize_weight(
    weight: onnx.TensorProto,
    axis: int | None,
    *,
    reduce_range: bool = False,
    dead_channel: float = 0.0,
    floor: Array | float = 0.0,
) -> Quantized:
    """Return a weight in -127 .. 127 (-63 .. 63 with `reduce_range`), scale max |w_c| / 127 for each channel.

    Parameters
    ----------
    weight : onnx.TensorProto
    axis : int, optional
        Of the output channels; None for one scale for all values.
    dead_channel : float
        A channel of zeros is dead, and one whose max |w_c| is below this; its integers are 0.
    floor : float, or array of shape (channels,)
        Least scale that lets the bias fit, see :func:`least_scales`.
    """
    values, amax = _ranges(weight, axis)
    levels = 127 if reduce_range else 255
    dtype = onnx.helper.tensor_dtype_to_np_dtype(weight.data_type)
    dead = _dead(amax, dead_channel)
    wanted = np.where(dead, np.where(np.asarray(floor) > 0, floor, DEAD_SCALE), amax / (levels // 2))
    scale = representable(np.maximum(wanted, floor), dtype)
    alive = np.where(dead, 0, scale).astype(np.float32)  # scale 0 gives zeros
    steps = alive if axis is not None else float(alive)
    codes = klquant.quantize(values, steps, axis=axis, num_quantized_bins=levels)
    return Quantized(codes, scale, int(np.sum(~dead & (np.asarray(floor) > COARSE * wanted))))


def quantize_operand(constant: onnx.TensorProto) -> Quantized:
    """Return a constant in 0 .. 255, with one scale and a zero point; a single value is exact."""
    values = to_array(constant).astype(np.float64)
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    scale = representable((high - low) / 255, np.dtype(np.float32))
    zero_point = int(np.rint(-low / float(scale)))
    codes = np.clip(np.rint(values / float(scale)) + zero_point, 0, 255).astype(np.uint8)
    return Quantized(codes, scale, zero_point=zero_point)


def representable(scale: Array | float, dtype: "np.dtype[Any]") -> Array:
    """Return positive scales in a dtype, rounded up where it is too coarse for the largest value to stay in range.

    All float16 values are multiples of its smallest subnormal number, so that is fine enough for any of them. Smaller
    than normal numbers of float32 may be flushed to zero.
    """
    limits = np.finfo(dtype)
    smallest = limits.smallest_subnormal if dtype == np.float16 else limits.tiny
    wanted = np.clip(np.asarray(scale, np.float64), float(smallest), float(limits.max))
    found = wanted.astype(dtype)
    cut = found.astype(np.float64) * 1.0015 < wanted  # up to there 255 levels are still enough
    result: Array = np.where(cut, np.nextafter(found, dtype.type(np.inf)), found)
    return result


def weight_scales(graph: Graph, num_bits: int, dead_channel: float = 0.0) -> dict[str, list[float]]:
    """Return the scale of each output channel of the weight of each layer, by name of the node; 0 for a dead one."""
    found = {}
    for node in (node for node in graph.nodes if node.op_type in WEIGHTED):
        if has_constant_weight(graph, node):
            _, amax = _ranges(graph.initializers[node.input[1]], weight_axis(graph, node))
            scales = np.where(_dead(amax, dead_channel), 0, amax / (2 ** (num_bits - 1) - 1))
            found[node.name] = np.atleast_1d(scales).tolist()
    return found


def _dead(amax: Array, dead_channel: float) -> Array:
    result: Array = (amax == 0) | (amax < dead_channel)
    return result


def _ranges(weight: onnx.TensorProto, axis: int | None) -> tuple[Array, Array]:
    """Return a weight in float32, and the largest absolute value of each of its channels."""
    values = to_array(weight).astype(np.float32)
    if not np.isfinite(values).all():
        raise InvalidInputError(f"weight `{weight.name}` must be finite, got NaN or infinity")
    others = None if axis is None else tuple(k for k in range(values.ndim) if k != axis)
    return values, np.asarray(np.abs(values).max(axis=others, initial=0.0))


def least_scales(graph: Graph, node: onnx.NodeProto, input_scale: float) -> Array | float:
    """Return the weight scales of a layer below which INT32 cannot hold its bias.

    A bias is counted in steps of input scale x weight scale, and onnxruntime does that itself with a bias in floating
    point. The raised scale moves each product by at most 2**-24 of the bias, which is what float32 loses in the sum.
    """
    if node.op_type == "ConvTranspose":  # always float in onnxruntime
        return 0.0
    bias = channel_bias(graph, node)
    largest = np.zeros(()) if bias is None else np.abs(bias.astype(np.float64))
    needed = np.maximum(largest / MAX_BIAS, float(np.finfo(np.float32).tiny)) / input_scale
    return np.where(np.isfinite(needed), needed, 0.0)


def quantize_bias(bias: Array, input_scale: float, weight_scale: Array) -> Quantized | None:
    """Return a bias in steps of the products that it is added to; None where INT32 cannot hold it."""
    scale = np.float32(input_scale) * weight_scale.astype(np.float32)
    if bias.shape != scale.shape or not (scale > 0).all():
        return None
    codes = np.rint(bias.astype(np.float64) / scale)
    return Quantized(codes.astype(np.int32), scale) if (np.abs(codes) < 2**31).all() else None
