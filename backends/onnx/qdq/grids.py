"""The integers that stand for an activation: scale, zero point, signed or not, by the rules of an engine."""

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import NamedTuple, TypeAlias

import onnx

from .plan import Plan


class Grid(NamedTuple):
    """How an activation becomes 8 bits."""

    threshold: float
    """T, in units of the activation."""
    scale: float
    zero_point: int
    dtype: int
    """Of onnx.TensorProto: INT8 or UINT8."""


Rule: TypeAlias = Callable[[float, bool], Grid]
"""From T, and whether the tensor has no negative values, to its grid."""


def signed(threshold: float, non_negative: bool) -> Grid:
    """Return INT8 with zero point 0: [-T, T] in steps of T / 127."""
    return Grid(threshold, threshold / 127, 0, onnx.TensorProto.INT8)


def by_sign(threshold: float, non_negative: bool) -> Grid:
    """Return the same, but UINT8 for what is not negative: [0, T] in steps half as wide, for the unused half."""
    if non_negative:
        return Grid(threshold, threshold / 255, 0, onnx.TensorProto.UINT8)
    return signed(threshold, non_negative)


def unsigned(threshold: float, non_negative: bool) -> Grid:
    """Return UINT8 for all: as onnxruntime's kernels want operands of one type, and join only those to a rectifier."""
    grid = by_sign(threshold, non_negative)
    return grid._replace(zero_point=0 if non_negative else 128, dtype=onnx.TensorProto.UINT8)


def make_grids(
    plan: Plan, thresholds: Mapping[str, float], non_negative: AbstractSet[str], rule: Rule
) -> dict[str, Grid]:
    """Return the grid of every planned activation; those that share one get the largest of their thresholds."""
    grids: dict[str, Grid] = {}
    for group in _groups(plan):
        threshold = max(thresholds[name] for name in group if name in thresholds)
        grids |= dict.fromkeys(group, rule(threshold, group <= non_negative))
    return {name: grids[name] for name in plan.readers}


def _groups(plan: Plan) -> Iterable[set[str]]:
    """Return the planned activations in groups of one scale each."""
    group_of = {name: {name} for name in plan.readers}
    for names in plan.shared:
        joined = set().union(*(group_of.get(name, {name}) for name in names))
        group_of |= dict.fromkeys(joined, joined)
    return {id(group): group for group in group_of.values()}.values()
