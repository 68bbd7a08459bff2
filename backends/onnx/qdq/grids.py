"""Quantization grids: scale, zero point and integer type of activations, weights and biases."""

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import NamedTuple, TypeAlias

import onnx

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
