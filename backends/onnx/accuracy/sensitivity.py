"""What each quantizer of a model costs in the model's own outputs, and which layers to leave out of INT8 first."""

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx

from ...settings import WEIGHTED, Engine
from ..execution import Feed, open_onnxruntime
from ..feeds import Array
from ..model.graph import Graph
from ..qdq.plan import Plan, make_plan
from .switches import NONE, SELECT, switched

FLOOR = 1e-2  # of the mean energy of an output's channels: in quieter ones the noise counts no more than in that


def quantizer_costs(
    graph: Graph, quantized: onnx.ModelProto, feeds: Sequence[Feed], advance: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Return the noise in the outputs, as a share of the signal, that each quantizer causes alone.

    It takes one run of the model for each quantizer and feed, and one more without any. Errors of several quantizers
    add up almost like independent noise: the sum of these shares is close to that of the quantized model.
    """
    model, names = switched(graph, quantized)
    costs = dict.fromkeys(names, 0.0)
    with open_onnxruntime(model, optimized=True) as session:
        for feed in feeds:
            floats = session(graph.outputs, {**feed, SELECT: np.asarray(NONE, np.int64)})
            for k, name in enumerate(names):
                found = session(graph.outputs, {**feed, SELECT: np.asarray(k, np.int64)})
                costs[name] += output_noise(floats, found) / len(feeds)
                advance()
    return costs


def output_noise(floats: Mapping[str, Array], found: Mapping[str, Array]) -> float:
    """Return the noise in the outputs of a model as a share of the signal, summed over the outputs."""
    return sum(_noise(array, found[name]) for name, array in floats.items())


def _noise(floats: Array, found: Array) -> float:
    """Return the mean over the channels (axis 1) of an output of noise / signal; 0 for outputs that are no floats."""
    if floats.dtype.kind != "f" or floats.shape != found.shape or not floats.size:
        return 0.0
    x, y = floats.astype(np.float64), found.astype(np.float64)
    x, noise = np.where(np.isfinite(x), x, 0), np.where(np.isfinite(x), x - y, 0)
    axes = tuple(k for k in range(x.ndim) if k != 1) if x.ndim > 2 else None
    signals, noises = ((values**2).mean(axis=axes) for values in (x, noise))
    share = np.mean(noises / np.maximum(signals, max(FLOOR * float(np.mean(signals)), 1e-30)))
    return float(np.nan_to_num(share, nan=1e3))


class _Left(NamedTuple):
    """What stays in INT8 with some names excluded."""

    cost: float
    layers: int
    """Layers with weights in INT8."""


def rank_layers(
    graph: Graph,
    thresholds: Mapping[str, Any],
    engine: Engine,
    excluded: tuple[str, ...],
    costs: Mapping[str, float],
    *,
    min_int8: float,
) -> list[str]:
    """Return which nodes or tensors to leave out, best first: what saves most noise for each layer that it costs.

    To exclude a tensor leaves its producer and its readers in floating point. The plan of the engine says what is no
    longer quantized then. The ranking ends where less than `min_int8` of the layers would stay in INT8.
    """
    total = sum(node.op_type in WEIGHTED for node in graph.nodes)

    def left(names: tuple[str, ...]) -> _Left:
        plan = make_plan(graph, thresholds, engine, excluded + names)
        return _Left(sum(costs.get(one, 0.0) for one in (*plan.readers, *plan.weights)), _num_int8(graph, plan))

    def worth(name: str) -> float:
        after = left((*chosen, name))
        return (now.cost - after.cost) / (1 + now.layers - after.layers)

    chosen: tuple[str, ...] = ()
    now = left(())
    plan = make_plan(graph, thresholds, engine, excluded)
    heap = [(-worth(name), k, name) for k, name in enumerate(_candidates(graph, plan))]
    heapq.heapify(heap)
    while heap and total:
        _, k, name = heapq.heappop(heap)
        value = worth(name)
        if value <= 0:
            continue
        if heap and value < -heap[0][0]:  # it was worth more before others were chosen
            heapq.heappush(heap, (-value, k, name))
            continue
        after = left((*chosen, name))
        if after.layers / total >= min_int8:
            chosen, now = (*chosen, name), after
    return list(chosen)


def _num_int8(graph: Graph, plan: Plan) -> int:
    return sum(node.op_type in WEIGHTED and node.name not in plan.skipped for node in graph.nodes)


def _candidates(graph: Graph, plan: Plan) -> list[str]:
    """Return the nodes that read quantized tensors, and these tensors."""
    nodes = [node.name for node in graph.nodes if not plan.readers.keys().isdisjoint(node.input)]
    return list(dict.fromkeys([*nodes, *plan.readers]))
