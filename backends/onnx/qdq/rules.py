"""The plan for each engine."""

from collections.abc import Collection, Iterable

from ...settings import Engine
from ..model.graph import Graph
from .embeddings import embeddings
from .explicit import explicit
from .floats import float_layers
from .kernels import operators
from .openvino import adapted
from .plan import Plan


def make_plan(
    graph: Graph,
    thresholds: Iterable[str],
    engine: Engine,
    exclude: tuple[str, ...] = (),
    *,
    products: Collection[str] = (),
) -> Plan:
    """Return the plan for an engine, given the names of the tensors with a threshold.

    For onnxruntime, the nodes `products` may multiply by a constant in INT8.
    """
    if engine == "onnxruntime":
        plan = operators(graph, thresholds, exclude, products)
    else:
        plan = explicit(graph, thresholds, exclude, layers_only=engine == "openvino")
    if engine == "openvino":
        plan = adapted(graph, plan)
    tables = set() if engine == "tensorrt" else embeddings(graph, exclude)
    floats = {name: reason for name, reason in float_layers(graph, exclude).items() if name not in tables}
    return plan._replace(skipped=plan.skipped | floats, tables=tables)
