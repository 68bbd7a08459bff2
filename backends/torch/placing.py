"""Put Q/DQ where a simulated model rounds, or where an engine's rules want them."""

import glob
from collections.abc import Iterable, Mapping
from typing import Any

import onnx

from klquant.errors import InvalidInputError

from ..onnx.graph import Graph, read_graph
from ..onnx.grids import make_grids, signed
from ..onnx.operators import MOVING, WEIGHTED, sole_consumer, weight_axis
from ..onnx.planning import EVERYONE, Plan
from ..onnx.preparing import prepare
from ..onnx.quantizing import Profile, QuantizedModel, quantize
from ..onnx.writing import write_qdq
from .marks import Roundings

UNROUNDED = "the simulation does not round what enters it"
FLOAT = "the simulation computes it in floating point"


def place_as_simulated(model: onnx.ModelProto, found: Roundings) -> QuantizedModel:
    """Return the model with Q/DQ where the simulation rounds, and nowhere else."""
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    graph = read_graph(model)
    found = _behind_moves(graph, found)
    plan = _plan(graph, found)
    grids = make_grids(plan, found.thresholds, set(), signed)
    written = write_qdq(model, plan, grids, int_bias=False, reduce_range=False)
    onnx.checker.check_model(written)
    return QuantizedModel(written, dict(found.thresholds), plan.skipped)


def _behind_moves(graph: Graph, found: Roundings) -> Roundings:
    """Round again right before a layer what was only moved since it was rounded: the same codes, for engines to see."""
    thresholds, readers, moved = dict(found.thresholds), dict(found.readers), {}
    for node in (node for node in graph.nodes if node.op_type in MOVING):
        source, result = node.input[0], node.output[0]
        if not readers.get(source, set()).isdisjoint((node.name, EVERYONE)):
            moved[source] = thresholds[source]
        layers = {reader.name for reader in graph.consumers.get(result, []) if reader.name in found.layers}
        if source in moved and result not in thresholds:
            moved[result] = moved[source]
            if layers:
                thresholds[result], readers[result] = moved[source], layers
    return found._replace(thresholds=thresholds, readers=readers)


def _plan(graph: Graph, found: Roundings) -> Plan:
    """Return the plan that does what the simulation does; layers whose input is not rounded keep their weights."""
    plan = Plan(found.readers, {}, [], {})
    for node in (node for node in graph.nodes if node.op_type in WEIGHTED):
        axis, readers = weight_axis(graph, node), found.readers.get(node.input[0], set())
        if node.name not in found.layers:
            plan.skipped[node.name] = FLOAT
        elif axis is None or readers.isdisjoint((node.name, EVERYONE)):
            plan.skipped[node.name] = UNROUNDED
        else:
            plan.weights[node.name] = axis
    return plan


def place_by_rules(
    model: onnx.ModelProto, found: Roundings, profile: Profile, batches: Iterable[Mapping[str, Any]] | None
) -> QuantizedModel:
    """Return the model with Q/DQ by the rules of a profile; what the simulation does not know is calibrated."""
    for tensor, first, second in found.conflicts:
        raise InvalidInputError(
            f"layers `{first}` and `{second}` must round what they share (`{tensor}`) by one scale for profile "
            f"`{profile}`, got two; give both the same threshold by `overrides`"
        )
    prepared = prepare(model)
    graph = read_graph(prepared)
    thresholds = _in_front_too(graph, found.thresholds)
    if batches is not None:
        from ..onnx.calibrating import calibrate

        calibrated = calibrate(prepared, batches).thresholds
        thresholds = {name: one.threshold for name, one in calibrated.items()} | thresholds
    floats = [node.name for node in graph.nodes if node.op_type in WEIGHTED and node.name not in found.layers]
    return quantize(prepared, thresholds, profile=profile, exclude=[glob.escape(name) for name in floats])


def _in_front_too(graph: Graph, thresholds: Mapping[str, float]) -> dict[str, float]:
    """Return the thresholds, with those of what only moves values for its input too: it rounds to the same codes."""
    known = dict(thresholds)
    for node in reversed(graph.nodes):
        result, source = node.output[0], node.input[0] if node.input else ""
        if node.op_type in MOVING and result in known and sole_consumer(graph, source) is not None:
            known.setdefault(source, known[result])
    return known
