"""Insert Q/DQ where a simulated model rounds, or where the rules of an engine say."""

from collections.abc import Iterable, Mapping, Set
from typing import Any

import onnx
from onnx import helper

from klquant.errors import InvalidInputError

from ...onnx.calibration import calibrate
from ...onnx.model.graph import Graph, read_graph
from ...onnx.model.observed import observed_tensors
from ...onnx.model.operators import MOVING, activations, has_constant_weight, sole_consumer, weight_axis
from ...onnx.model.preparation import Prepared, prepare
from ...onnx.qdq.floats import float_layers
from ...onnx.qdq.grids import make_grids, signed
from ...onnx.qdq.insertion import write_qdq
from ...onnx.qdq.plan import EVERYONE, Plan
from ...onnx.qdq.rules import make_plan
from ...onnx.qdq_model import QDQModel
from ...onnx.quantization import quantize
from ...settings import WEIGHTED, Engine
from ...warning import warn_of_floats
from .markers import Roundings, remove_marks
from .trace import Traced

UNROUNDED = "the simulation does not round its input"
FLOAT = "the simulation computes it in floating point"
UNREACHED = "the example does not reach it"
SHORTCUT = 'the simulation does not round its shortcut; quantize with engine="tensorrt" or pass `batches`'


def place(
    traced: Traced,
    engine: Engine,
    batches: Iterable[Mapping[str, Any]] | None,
    *,
    may_ignore: bool = False,
    has_sums: bool = False,
) -> QDQModel:
    """Return a traced model with Q/DQ as simulated or, with batches and for onnxruntime, by the rules of an engine.

    Batches that the user did not pass (`may_ignore`) may be none, and are ignored if layers round one tensor
    differently, which those rules do not allow. If the simulation `has_sums`, TensorRT gets no others.
    """
    model, found = remove_marks(traced)
    if may_ignore and (not batches or (found.conflicts and engine != "onnxruntime")):
        batches = None
    if batches is None and engine != "onnxruntime":
        result = _as_simulated(model, found, has_sums=has_sums or engine != "tensorrt")
    else:
        result = _by_rules(model, found, engine, batches, has_sums=has_sums and engine == "tensorrt")
    result.skipped.update({name: UNREACHED for name in traced.layers if name not in found.reached})
    return result


def _as_simulated(model: onnx.ModelProto, found: Roundings, *, has_sums: bool) -> QDQModel:
    """Return the model with Q/DQ only where the simulation rounds; warn of residual sums if it has none."""
    found = _behind_moves(read_graph(model), found)
    known = {value.name for value in (*model.graph.input, *model.graph.output, *model.graph.value_info)}
    new = [name for name in found.thresholds if name not in known]  # the exporter leaves out few types
    model.graph.value_info.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in new)
    graph = read_graph(model)
    plan = _plan(graph, found)
    sums = {} if has_sums else dict.fromkeys(_residual_sums(graph, plan), SHORTCUT)
    warn_of_floats("node", sums)
    grids = make_grids(plan, found.thresholds, set(), signed)
    written = write_qdq(model, graph, plan, grids, int_bias=False, reduce_range=False)
    onnx.checker.check_model(written)
    ranges = {name: grid.range for name, grid in grids.items()}
    return QDQModel(written, dict(found.thresholds), plan.skipped | sums, ranges=ranges)


def _behind_moves(graph: Graph, found: Roundings) -> Roundings:
    """Round again before a layer if the tensor was only moved since it was rounded.

    The codes are the same, but engines look for Q/DQ next to the layer.
    """
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
    """Return the plan of the simulation; layers with unrounded inputs keep their float weights."""
    plan = Plan(found.readers, {}, [], {})
    for node in (node for node in graph.nodes if node.op_type in WEIGHTED):
        rounded = [not found.readers.get(name, set()).isdisjoint((node.name, EVERYONE)) for name in node.input[:2]]
        if node.name not in found.layers:
            plan.skipped[node.name] = FLOAT
        elif not has_constant_weight(graph, node):
            plan.skipped.update({} if all(rounded) else {node.name: UNROUNDED})
        elif not rounded[0]:
            plan.skipped[node.name] = UNROUNDED
        else:
            plan.weights[node.name] = weight_axis(graph, node)
    return plan._replace(skipped=plan.skipped | float_layers(graph, ()))


def _residual_sums(graph: Graph, plan: Plan) -> list[str]:
    """Return the names of the sums with a shortcut that the rules of TensorRT quantize, and the plan does not."""
    rules = make_plan(graph, observed_tensors(graph), "tensorrt", tuple(plan.skipped)).readers
    missing = set[str]().union(*rules.values()) - set[str]().union(*plan.readers.values())
    return [node.name for node in graph.nodes if node.op_type == "Add" and node.name in missing]


def _by_rules(
    model: onnx.ModelProto,
    found: Roundings,
    engine: Engine,
    batches: Iterable[Mapping[str, Any]] | None,
    *,
    has_sums: bool,
) -> QDQModel:
    """Return the model with Q/DQ by the rules of an engine; thresholds that the simulation lacks are calibrated."""
    for tensor, first, second in found.conflicts:
        raise InvalidInputError(
            f"layers `{first}` and `{second}` must round their common input (`{tensor}`) by one scale for engine "
            f"'{engine}', got two; give both the same threshold by `overrides`"
        )
    prepared = prepare(model)
    graph = prepared.graph
    floats = _floats(graph, read_graph(model), found)
    exclude = (*floats, *(_other_sums(graph, found) if has_sums else ()))
    thresholds = _through_moves(graph, found.thresholds)
    if batches is not None:
        observed = observed_tensors(graph)
        wanted = make_plan(graph, observed, engine, exclude).readers.keys() & observed
        thresholds |= _calibrated(prepared, batches, wanted - thresholds.keys())
    result = quantize(prepared, thresholds, engine=engine, exclude=exclude)
    return result._replace(skipped={**result.skipped, **dict.fromkeys(floats, FLOAT)})


def _floats(graph: Graph, before: Graph, found: Roundings) -> list[str]:
    """Return the names of prepared nodes that compute like layers but are not layers of the simulation."""
    nodes = {node.name: node for node in before.nodes}
    weights = {nodes[name].input[1] for name in found.layers}

    def is_layer(node: onnx.NodeProto) -> bool:  # a product joined with its bias has a new name
        return node.name in found.layers or (node.name not in nodes and node.input[1] in weights)

    return [node.name for node in graph.nodes if node.op_type in WEIGHTED and not is_layer(node)]


def _other_sums(graph: Graph, found: Roundings) -> list[str]:
    """Return the names of the sums that the simulation leaves in floating point."""
    rounded = set[str]().union(*found.readers.values())
    sums = (node for node in graph.nodes if node.op_type == "Add" and len(activations(graph, node)) == 2)
    return [node.name for node in sums if node.name not in rounded]


def _calibrated(model: Prepared, batches: Iterable[Mapping[str, Any]], names: Set[str]) -> dict[str, float]:
    """Calibrate these tensors with the entropy criterion, and return T by name."""
    if not names:
        return {}
    found = calibrate(model, batches, include=sorted(names))
    return {name: layer.threshold for name, layer in found.thresholds.items()}


def _through_moves(graph: Graph, thresholds: Mapping[str, float]) -> dict[str, float]:
    """Return the thresholds, extended to tensors that hold the same values, only moved."""
    known = dict(thresholds)
    moves = [(node.input[0], node.output[0]) for node in graph.nodes if node.op_type in MOVING]
    for source, result in moves:
        if source in known:
            known.setdefault(result, known[source])
    for source, result in reversed(moves):
        if result in known and sole_consumer(graph, source) is not None:
            known.setdefault(source, known[result])
    return known
