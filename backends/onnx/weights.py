"""Weights and biases as integers: symmetric, one scale per output channel."""

from typing import Any, NamedTuple

import numpy as np
import onnx

import klquant
from klquant.errors import InvalidInputError

from ..settings import DEAD_CHANNEL
from .graph import Graph, to_array
from .operators import WEIGHTED, weight_axis

Array = np.ndarray[Any, Any]


class Quantized(NamedTuple):
    """A constant as integers."""

    codes: Array
    """int8 or int32, in the shape of the constant."""
    scale: Array
    """In its dtype, shape (channels,)."""


def quantize_weight(weight: onnx.TensorProto, axis: int, *, reduce_range: bool = False) -> Quantized:
    """Return a weight in -127 .. 127 (-63 .. 63 with `reduce_range`), scale max |w_c| / 127 for each channel.

    A channel below 1e-4 is dead and becomes 0, as in :func:`klquant.backends.torch.quantize_weights`.
    """
    values, amax = _ranges(weight, axis)
    levels = 127 if reduce_range else 255
    dtype = onnx.helper.tensor_dtype_to_np_dtype(weight.data_type)
    scale = (np.maximum(amax, DEAD_CHANNEL) / np.float32(levels // 2)).astype(dtype)
    alive = np.where(amax < DEAD_CHANNEL, 0, scale).astype(np.float32)  # scale 0 gives zeros
    return Quantized(klquant.quantize(values, alive, axis=axis, num_quantized_bins=levels), scale)


def weight_scales(graph: Graph, num_bits: int) -> dict[str, list[float]]:
    """Return the scale of each output channel of the weight of each layer, by name of the node; 0 for a dead one."""
    found = {}
    for node in (node for node in graph.nodes if node.op_type in WEIGHTED):
        if (axis := weight_axis(graph, node)) is not None:
            _, amax = _ranges(graph.initializers[node.input[1]], axis)
            found[node.name] = np.where(amax < DEAD_CHANNEL, 0, amax / (2 ** (num_bits - 1) - 1)).tolist()
    return found


def _ranges(weight: onnx.TensorProto, axis: int) -> tuple[Array, Array]:
    """Return a weight in float32, and the largest absolute value of each of its channels."""
    values = to_array(weight).astype(np.float32)
    if not np.isfinite(values).all():
        raise InvalidInputError(f"weight `{weight.name}` must be finite, got NaN or infinity")
    others = tuple(k for k in range(values.ndim) if k != axis)
    return values, np.abs(values).max(axis=others, initial=0.0)


def quantize_bias(bias: onnx.TensorProto, input_scale: float, weight_scale: Array) -> Quantized | None:
    """Return a bias in steps of the products that it is added to; None where INT32 cannot hold it."""
    values, scale = to_array(bias), np.float32(input_scale) * weight_scale.astype(np.float32)
    if values.shape != scale.shape:
        return None
    codes = np.rint(values.astype(np.float64) / scale)
    return Quantized(codes.astype(np.int32), scale) if (np.abs(codes) < 2**31).all() else None
