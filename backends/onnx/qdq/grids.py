"""Quantization grids: scale, zero point and integer type of activations, weights and biases."""

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import onnx

import klquant
from klquant.errors import InvalidInputError

from ...settings import DEAD_CHANNEL, WEIGHTED
from ..model.graph import Graph, to_array
from ..model.operators import weight_axis
from .plan import Plan


class Grid(NamedTuple):
    """How an activation is quantized to 8 bits."""

    threshold: float
    """T, in units of the activation."""
    scale: float
    zero_point: int
    dtype: int
    """INT8 or UINT8 of onnx.TensorProto."""


Rule: TypeAlias = Callable[[float, bool], Grid]
"""Returns the grid for T, given whether the tensor is never negative."""


def signed(threshold: float, non_negative: bool) -> Grid:
    """Return INT8 with zero point 0: [-T, T] in steps of T / 127."""
    return Grid(threshold, threshold / 127, 0, onnx.TensorProto.INT8)


def by_sign(threshold: float, non_negative: bool) -> Grid:
    """Return INT8 as `signed`, but for tensors that are never negative UINT8: [0, T] in steps of T / 255."""
    if non_negative:
        return Grid(threshold, threshold / 255, 0, onnx.TensorProto.UINT8)
    return signed(threshold, non_negative)


def unsigned(threshold: float, non_negative: bool) -> Grid:
    """Return UINT8 always: onnxruntime's kernels need operands of one type, and only UINT8 fuses with a rectifier."""
    grid = by_sign(threshold, non_negative)
    return grid._replace(zero_point=0 if non_negative else 128, dtype=onnx.TensorProto.UINT8)


def make_grids(
    plan: Plan, thresholds: Mapping[str, float], non_negative: AbstractSet[str], rule: Rule
) -> dict[str, Grid]:
    """Return the grid of every planned activation; activations that share a grid use their largest threshold."""
    grids: dict[str, Grid] = {}
    for group in _groups(plan):
        threshold = max(thresholds[name] for name in group if name in thresholds)
        grids |= dict.fromkeys(group, rule(threshold, group <= non_negative))
    return {name: grids[name] for name in plan.readers}


def _groups(plan: Plan) -> Iterable[set[str]]:
    """Return the planned activations in groups that share a scale."""
    group_of = {name: {name} for name in plan.readers}
    for names in plan.shared:
        joined = set().union(*(group_of.get(name, {name}) for name in names))
        group_of |= dict.fromkeys(joined, joined)
    return {id(group): group for group in group_of.values()}.values()


Array = np.ndarray[Any, Any]


class Quantized(NamedTuple):
    """A quantized constant."""

    codes: Array
    """int8 or int32, in the shape of the constant."""
    scale: Array
    """Shape (channels,); for weights in the dtype of the constant, for biases float32."""


def quantize_weight(weight: onnx.TensorProto, axis: int, *, reduce_range: bool = False) -> Quantized:
    """Quantize a weight to -127 .. 127 (-63 .. 63 with `reduce_range`), with scale max |w_c| / 127 per channel.

    A channel with all |w| below 1e-4 is dead and becomes 0, as in :func:`klquant.backends.torch.quantize_weights`.
    """
    values, amax = _ranges(weight, axis)
    levels = 127 if reduce_range else 255
    dtype = onnx.helper.tensor_dtype_to_np_dtype(weight.data_type)
    scale = (np.maximum(amax, DEAD_CHANNEL) / np.float32(levels // 2)).astype(dtype)
    alive = np.where(amax < DEAD_CHANNEL, 0, scale).astype(np.float32)  # scale 0 gives zeros
    return Quantized(klquant.quantize(values, alive, axis=axis, num_quantized_bins=levels), scale)


def weight_scales(graph: Graph, num_bits: int) -> dict[str, list[float]]:
    """Return the scales of each layer's weight, one per output channel, by node name; 0 for dead channels."""
    found = {}
    for node in (node for node in graph.nodes if node.op_type in WEIGHTED):
        if (axis := weight_axis(graph, node)) is not None:
            _, amax = _ranges(graph.initializers[node.input[1]], axis)
            found[node.name] = np.where(amax < DEAD_CHANNEL, 0, amax / (2 ** (num_bits - 1) - 1)).tolist()
    return found


def _ranges(weight: onnx.TensorProto, axis: int) -> tuple[Array, Array]:
    """Return a weight in float32 and the largest absolute value of each channel."""
    values = to_array(weight).astype(np.float32)
    if not np.isfinite(values).all():
        raise InvalidInputError(f"weight `{weight.name}` must be finite, got NaN or infinity")
    others = tuple(k for k in range(values.ndim) if k != axis)
    return values, np.abs(values).max(axis=others, initial=0.0)


def quantize_bias(bias: onnx.TensorProto, input_scale: float, weight_scale: Array) -> Quantized | None:
    """Quantize a bias with the scale of the products that it is added to; None if INT32 cannot hold it."""
    values, scale = to_array(bias), np.float32(input_scale) * weight_scale.astype(np.float32)
    if values.shape != scale.shape:
        return None
    codes = np.rint(values.astype(np.float64) / scale)
    return Quantized(codes.astype(np.int32), scale) if (np.abs(codes) < 2**31).all() else None
