"""Where the quantizers of a model go, and on which grid each rounds."""

from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from typing import NamedTuple

import numpy as np
import onnx

from klquant.errors import InvalidInputError

from ..calibration import Calibration, checked
from ..curves import Curve
from ..ranges import Candidate
from ..settings import Engine, matching
from .lowering.api import lower
from .model.fingerprint import fingerprint
from .model.graph import Graph
from .model.pointwise import find_curves
from .model.preparation import Prepared
from .model.signs import non_negative
from .qdq.floats import body_layers
from .qdq.grids import (
    Grid,
    Rule,
    by_sign,
    fitted,
    make_grids,
    shifted_candidates,
    signed,
    slow_with_zero_points,
    unsigned,
)
from .qdq.plan import Plan
from .qdq.rules import make_plan

RULES: dict[Engine, Rule] = {"tensorrt": signed, "onnxruntime": unsigned, "openvino": by_sign}


class Placement(NamedTuple):
    """Where quantizers go."""

    prepared: Prepared
    """The float model, for onnxruntime with operators that have INT8 kernels."""
    plan: Plan
    grids: dict[str, Grid]
    """By activation of `prepared`."""
    factors: Mapping[str, float] = {}
    """By what its values are multiplied there, where that is not 1."""

    def given(self) -> dict[str, Grid]:
        """Return the grids in units of the model that was given."""
        return {
            name: grid._replace(threshold=grid.threshold / factor, scale=grid.scale / factor)
            for name, grid in self.grids.items()
            for factor in (self.factors.get(name, 1.0),)
        }


class Ranges(NamedTuple):
    """The ranges that activations may get, fitted to an engine."""

    thresholds: dict[str, float]
    """T by name."""
    candidates: dict[str, Candidate]
    """[low, high] by name; empty where all grids are symmetric."""

    def replaced(self, others: "Ranges", names: Collection[str]) -> "Ranges":
        """Return these ranges, with those of others for some tensors."""
        chosen = {name: others if name in names else self for name in self.thresholds}
        thresholds = {name: ranges.thresholds[name] for name, ranges in chosen.items()}
        both = {name: ranges.candidates[name] for name, ranges in chosen.items() if name in ranges.candidates}
        return Ranges(thresholds, both)


def place(
    prepared: Prepared,
    calibration: Calibration | Mapping[str, float],
    engine: Engine,
    exclude: Iterable[str] | str = (),
    slow: Iterable[str] = (),
    *,
    asymmetric: bool = True,
) -> Placement:
    """Return where quantizers go, and the grid of each activation; `slow` are names of nodes to leave out too."""
    excluded = (*excluded_names(prepared, calibration, exclude), *slow)
    return place_ranges(prepared, find_ranges(prepared, calibration, engine, asymmetric=asymmetric), engine, excluded)


def find_ranges(
    prepared: Prepared, calibration: Calibration | Mapping[str, float], engine: Engine, *, asymmetric: bool
) -> Ranges:
    """Return the ranges of a calibration, fitted to the grids of an engine."""
    graph = prepared.graph
    if not isinstance(calibration, Calibration):
        return Ranges(_thresholds(calibration), {})
    calibration.check_fits(fingerprint(graph) if calibration.model else {})
    if not asymmetric or engine == "tensorrt":
        return Ranges(_thresholds(calibration), {})
    symmetric = slow_with_zero_points(graph) if engine == "openvino" else set()
    curves = _curves(prepared, calibration) if engine == "onnxruntime" else {}
    calibration = fitted(calibration, symmetric, curves)
    return Ranges(_thresholds(calibration), shifted_candidates(calibration, symmetric, curves))


def place_ranges(prepared: Prepared, ranges: Ranges, engine: Engine, excluded: tuple[str, ...]) -> Placement:
    """Return where quantizers go with these ranges; `excluded` are names, not patterns."""
    thresholds, candidates = ranges
    if engine == "onnxruntime":
        prepared, thresholds, candidates, plan, factors = lower(prepared, thresholds, candidates, excluded)
    else:
        plan, factors = make_plan(prepared.graph, thresholds, engine, excluded), {}
    _check_types(prepared, plan)
    grids = make_grids(plan, thresholds, non_negative(prepared.graph), RULES[engine], candidates)
    return Placement(prepared, plan, grids, factors)


def _curves(prepared: Prepared, calibration: Calibration) -> dict[str, Curve]:
    """Return the pointwise functions that read activations, at the edges and centres of the bins."""
    edges = {name: np.asarray(calibration.histograms[name].edges) for name in calibration.histograms}
    points = {name: np.union1d(one, (one[1:] + one[:-1]) / 2) for name, one in edges.items()}
    return find_curves(prepared, points)


def _check_types(prepared: Prepared, plan: Plan) -> None:
    opset = next(entry.version for entry in prepared.model.opset_import if entry.domain in ("", "ai.onnx"))
    weights = {node.input[1] for node in prepared.graph.nodes if node.name in plan.weights}
    halves = [name for name in (*plan.readers, *weights) if prepared.graph.types[name] == onnx.TensorProto.FLOAT16]
    if opset < 19 and halves:
        raise InvalidInputError(f"quantizers of float16 need opset 19 or newer, got opset {opset}")


def _thresholds(calibration: Calibration | Mapping[str, float]) -> dict[str, float]:
    """Return T by tensor name, checked."""
    if isinstance(calibration, Mapping):
        found = {name: float(value) for name, value in calibration.items()}
    else:
        layers = checked(calibration).thresholds
        found = {name: layer.threshold for name, layer in layers.items()}
        for name, layer in layers.items():
            if layer.num_bits != 8:
                raise InvalidInputError(f"tensor `{name}` must be calibrated for 8 bits, got {layer.num_bits}")
    if not found:
        raise InvalidInputError("expected thresholds, got none; call search_thresholds() first")
    for name, value in found.items():
        if not 0 < value < float("inf"):
            raise InvalidInputError(f"the threshold of `{name}` must be positive and finite, got {value}")
    return found


def excluded_names(
    prepared: Prepared, calibration: Calibration | Mapping[str, float], exclude: Iterable[str] | str
) -> tuple[str, ...]:
    """Return the names that patterns match, and those that the calibration skipped."""
    skipped = tuple(calibration.skipped) if isinstance(calibration, Calibration) else ()
    return (*_matching(prepared.graph, exclude), *skipped)


def _matching(graph: Graph, exclude: Iterable[str] | str) -> tuple[str, ...]:
    """Return the names that the patterns match; refuse a pattern that matches nothing: it is misspelt."""
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    nodes = [name for node in graph.nodes for name in (node.name, node.op_type)]
    bodies = [path for node in graph.nodes for path in body_layers(graph, node)]
    names = list(dict.fromkeys([*nodes, *bodies, *graph.inputs, *graph.producers]))
    for pattern in patterns:
        if not matching(names, [pattern]):
            close = get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise InvalidInputError(f"pattern `{pattern}` matches no node, tensor or operator; similar names: {close}")
    return tuple(matching(names, patterns))
