"""What each quantizer of a model costs in the model's own outputs, and which layers to leave out of INT8 first."""

import heapq
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import onnx

from ...accuracy.padding import unpadded
from ...settings import WEIGHTED, Engine
from ..execution import Feed, open_onnxruntime, with_outputs
from ..model.graph import MAX_CHAIN, Graph
from ..model.operators import is_rectifier, unscaled
from ..qdq.rules import make_plan
from .output_noise import OutputNoise, smooth_outputs
from .switches import switched

Names: TypeAlias = tuple[str, ...]


def quantizer_costs(graph: Graph, quantized: onnx.ModelProto, feeds: Sequence[Feed]) -> dict[str, float]:
    """Return the noise in the outputs, as a share of the signal, that each quantizer causes alone.

    It takes one run of the model for each quantizer and feed, and one more without any. Errors of several quantizers
    add up almost like independent noise: the sum of these shares is close to that of the quantized model.
    """
    model = switched(graph, quantized)
    costs, outputs = {name: OutputNoise() for name in model.quantizers}, smooth_outputs(graph)
    with open_onnxruntime(with_outputs(model.model, outputs), optimized=True) as session:
        for feed in feeds:
            floats = session(outputs, {**feed, **model.rounding([])})
            for k, name in enumerate(model.quantizers):
                found = session(outputs, {**feed, **model.rounding([k])})
                costs[name] = costs[name].plus(OutputNoise.of(unpadded(feed, floats), unpadded(feed, found), outputs))
    return {name: cost.share() for name, cost in costs.items()}


class _Left(NamedTuple):
    """What stays in INT8 with some names excluded."""

    cost: float
    layers: int
    """Layers with weights in INT8."""
    work: float
    """Share of the work."""


def rank_layers(  # noqa: PLR0913 the limits
    graph: Graph,
    thresholds: Mapping[str, Any],
    engine: Engine,
    excluded: tuple[str, ...],
    costs: Mapping[str, float],
    *,
    min_int8: float,
    work: Mapping[str, float] | None = None,
    min_work: float = 0.0,
    least: float = 0.0,
) -> list[Names]:
    """Return what to leave out, best first: what saves most noise for each layer that it costs.

    That is a node, or a tensor with all that computes and reads it. The plan of the engine says what is no longer
    quantized then. The ranking ends where less than `min_int8` of the layers would stay in INT8; with `work`, what each
    layer takes to compute, also where less than `min_work` of it would. What saves less than `least` of the noise
    is not considered.
    """
    total, effort = sum(node.op_type in WEIGHTED for node in graph.nodes), sum((work or {}).values())
    least *= sum(costs.values())
    costs = _shared(graph, costs)

    def left(names: Names) -> _Left:
        plan = make_plan(graph, thresholds, engine, excluded + names)
        int8 = [node.name for node in graph.nodes if node.op_type in WEIGHTED and node.name not in plan.skipped]
        share = sum(work.get(name, 0.0) for name in int8) / effort if work and effort else 1.0
        quantizers = {unscaled(graph, name) for name in (*plan.readers, *plan.weights)}
        return _Left(sum(cost for name, cost in costs.items() if name in quantizers), len(int8), share)

    def worth(names: Names) -> float:
        after = left(chosen + names)
        return (now.cost - after.cost) / (1 + now.layers - after.layers)

    chosen: Names = ()
    quantized = make_plan(graph, thresholds, engine, excluded).readers
    now, ranking = left(()), list[Names]()
    wanted = {name for name, cost in costs.items() if cost >= least}
    heap = [(-worth(names), k, names) for k, names in enumerate(_candidates(graph, quantized, wanted))]
    heapq.heapify(heap)
    while heap and total:
        _, k, names = heapq.heappop(heap)
        value = worth(names)
        if value <= least / 2:
            continue
        if heap and value < -heap[0][0]:  # it was worth more before others were chosen
            heapq.heappush(heap, (-value, k, names))
            continue
        after = left(chosen + names)
        if after.layers / total >= min_int8 and after.work >= min_work:
            chosen, now = chosen + names, after
            ranking.append(names)
    return ranking


def _shared(graph: Graph, costs: Mapping[str, float]) -> dict[str, float]:
    """Return one cost for tensors that are alike but for a scalar factor: without one, the next gets its noise."""
    found = dict.fromkeys((unscaled(graph, name) for name in costs), 0.0)
    for name, cost in costs.items():
        found[unscaled(graph, name)] += cost
    return found


def _candidates(graph: Graph, quantized: Iterable[str], wanted: Collection[str]) -> list[Names]:
    """Return the nodes that read wanted tensors or have a wanted weight, and these tensors before their rectifiers.

    Tensors that are alike but for a scalar factor go together.
    """
    alike: dict[str, list[str]] = {unscaled(graph, name): [] for name in quantized}
    for name in (*graph.inputs, *graph.producers):
        if (first := unscaled(graph, name)) in wanted and first in alike:
            alike[first].append(name)
    names = {name for group in alike.values() for name in group}
    nodes = [(node.name,) for node in graph.nodes if node.name in wanted or not names.isdisjoint(node.input)]
    before = ([one for name in group for one in _before_rectifiers(graph, name)] for group in alike.values() if group)
    return [*nodes, *(tuple(dict.fromkeys(group)) for group in before)]


def _before_rectifiers(graph: Graph, name: str) -> Names:
    names = [name]
    for _ in range(MAX_CHAIN):
        node = graph.producers.get(names[-1])
        if node is None or not is_rectifier(graph, node):
            break
        names.append(node.input[0])
    return tuple(names)
