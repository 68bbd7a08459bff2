"""Which nodes of a model an engine executes in int8, and why not the others."""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, TypeAlias

import onnx

from ...settings import Engine, check_engine
from ..model.graph import Graph, node_key, read_graph
from ..model.loading import valid_or_refused
from . import onnxruntime as onnxruntime_engine
from . import openvino as openvino_engine
from . import tensorrt as tensorrt_engine
from .inspected_model import computing_nodes, load
from .quantizer_nodes import label
from .verdicts import Verdict

Verdicts: TypeAlias = Callable[[onnx.ModelProto, Graph, list[onnx.NodeProto]], dict[str, Verdict]]
ENGINES: dict[Engine, Verdicts] = {
    "onnxruntime": onnxruntime_engine.verdicts,
    "openvino": openvino_engine.verdicts,
    "tensorrt": tensorrt_engine.verdicts,
}


class NodeReport(NamedTuple):
    """How an engine executes one node."""

    name: str
    """The node's, or its output's if it has none."""
    op_type: str
    int8: bool
    reason: str
    """Why not; or as what."""


class OperatorCount(NamedTuple):
    """How many nodes of one operator are executed in int8."""

    op_type: str
    int8: int
    total: int
    reasons: dict[str, int]
    """Of those that are not, with how often each was given."""


def inspect(model: str | Path | onnx.ModelProto, engine: Engine) -> list[NodeReport]:
    """Tell for each node whether an engine executes it in int8, and why not.

    onnxruntime and openvino are asked themselves, here, on this machine's CPU: the one writes the graph that it
    made of the model, the other lists its kernels. TensorRT needs a GPU; its documented rules are checked instead.

    Parameters
    ----------
    model : path or onnx.ModelProto
        With QuantizeLinear and DequantizeLinear; in a float model all is floating point.
    engine : {"onnxruntime", "openvino", "tensorrt"}
        Who is to execute it.

    Returns
    -------
    list of NodeReport
        One for each node that computes with values that depend on the model's input, in the graph's order.
        Quantizers, constants and what only computes shapes are left out.

    Raises
    ------
    InvalidInputError
        For another engine, or what is no valid ONNX model.
    ModelError
        If the engine refuses the model; its own error is the cause.
    MissingDependencyError
        If openvino is asked for and not installed.

    Notes
    -----
    A node counts as int8 if the values that enter its kernel are 8 bits wide. What is executed as part of another
    node (a Relu in a convolution) shares the verdict on that. Both engines choose by the CPU: on another one the
    answer may differ.
    """
    check_engine(engine)
    model = load(model)
    with valid_or_refused(model):
        graph = read_graph(model)
        nodes = computing_nodes(graph)
        found = ENGINES[engine](model, graph, nodes)
    return [NodeReport(label(node), node.op_type, *found[node_key(node)]) for node in nodes]


def summarize(reports: Iterable[NodeReport]) -> list[OperatorCount]:
    """Count the nodes in INT8 by operator.

    Parameters
    ----------
    reports : iterable of NodeReport
        From :func:`inspect`.

    Returns
    -------
    list of OperatorCount
        In the order in which operators first occur.
    """
    by_operator: dict[str, list[NodeReport]] = {}
    for report in reports:
        by_operator.setdefault(report.op_type, []).append(report)
    return [
        OperatorCount(
            op_type=op_type,
            int8=sum(report.int8 for report in found),
            total=len(found),
            reasons=dict(Counter(report.reason for report in found if not report.int8)),
        )
        for op_type, found in by_operator.items()
    ]
