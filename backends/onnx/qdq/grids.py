"""Quantization grids: scale, zero point and integer type of activations, weights and biases."""

from collections.abc import Callable, Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import NamedTuple, TypeAlias

import onnx

from ...calibration import Calibration
from ...curves import Curve
from ...function_ranges import function_ranges
from ...grid_thresholds import grid_thresholds
from ...ranges import STEPS, Candidate, Range, better_range, candidates
from ...settings import WEIGHTED
from ..model.graph import Graph
from ..model.operators import attribute, has_constant_weight, is_padded
from .plan import Plan


class Grid(NamedTuple):
    """How an activation is quantized to 8 bits."""

    threshold: float
    """T, in units of the activation."""
    scale: float
    zero_point: int
    dtype: int
    """INT8 or UINT8 of onnx.TensorProto."""

    @property
    def range(self) -> Range:
        """Return the smallest and the largest value that the integers stand for."""
        least = -128 if self.dtype == onnx.TensorProto.INT8 else 0
        return Range((least - self.zero_point) * self.scale, (least + STEPS - self.zero_point) * self.scale)


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
    plan: Plan,
    thresholds: Mapping[str, float],
    non_negative: AbstractSet[str],
    rule: Rule,
    known: Mapping[str, Candidate] | None = None,
) -> dict[str, Grid]:
    """Return the grid of every planned activation.

    Activations that share a grid use their largest threshold or, if all of them are candidates and it has less error,
    the union of their ranges. Those that are never negative have all levels above 0 anyway.
    """
    grids: dict[str, Grid] = {}
    for group in _groups(plan):
        names = [name for name in group if name in thresholds]
        grid = rule(max(thresholds[name] for name in names), group <= non_negative)
        if known and not group <= non_negative and known.keys() >= set(names):
            grid = _shifted(grid, [known[name] for name in names])
        grids |= dict.fromkeys(group, grid)
    return {name: grids[name] for name in plan.readers}


def _shifted(grid: Grid, group: list[Candidate]) -> Grid:
    """Return UINT8 over [low, high] if that has less error than a symmetric grid."""
    found = better_range(group, grid.scale, 128)
    return grid if found is None else Grid(grid.threshold, found.scale, found.zero_point, onnx.TensorProto.UINT8)


def _groups(plan: Plan) -> Iterable[set[str]]:
    """Return the planned activations in groups that share a scale."""
    group_of = {name: {name} for name in plan.readers}
    for names in plan.shared:
        joined = set().union(*(group_of.get(name, {name}) for name in names))
        group_of |= dict.fromkeys(joined, joined)
    return {id(group): group for group in group_of.values()}.values()


def fitted(calibration: Calibration, slow: Collection[str], curves: Mapping[str, Curve]) -> Calibration:
    """Return a calibration with thresholds for the grids of an engine that has zero points, and for the readers."""
    return function_ranges(calibration._replace(thresholds=grid_thresholds(calibration, slow)), curves)


def shifted_candidates(
    calibration: Calibration | Mapping[str, float], slow: Collection[str], curves: Mapping[str, Curve]
) -> dict[str, Candidate]:
    """Return the ranges that an engine can run at no loss of speed; thresholds alone have none."""
    if not isinstance(calibration, Calibration):
        return {}
    found = candidates(calibration, curves)
    return {name: one for name, one in found.items() if one.range.low == 0 or name not in slow}


def slow_with_zero_points(graph: Graph) -> set[str]:
    """Return the activations that OpenVINO should read with zero point 0: other zero points are slower there.

    Measured on OpenVINO 2026.4: a convolution with padding takes up to twice the time, because it corrects for the
    padding; a product corrects in an operator behind it, or falls back to floating point. Other convolutions, and
    depthwise ones, take the same time.
    """
    layers = [node for node in graph.nodes if node.op_type in WEIGHTED and not _is_free(graph, node)]
    return {name for node in layers for name in node.input[:2]}


def _is_free(graph: Graph, node: onnx.NodeProto) -> bool:
    """Return whether a layer is a convolution that takes no time for zero points."""
    if node.op_type != "Conv" or not has_constant_weight(graph, node):
        return False
    depthwise = graph.initializers[node.input[1]].dims[1] == 1 and attribute(node, "group", 1) != 1
    return depthwise or not is_padded(node)
