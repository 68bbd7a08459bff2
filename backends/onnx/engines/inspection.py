"""Report which nodes of a model an engine runs in int8, and why others stay in floating point."""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, TypeAlias

import onnx

from ...settings import Engine, check_engine
from ..model.graph import Graph, node_key, read_graph
from ..model.loading import blaming_invalid_model
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
    """How an engine runs one node, from :func:`inspect`."""

    name: str
    """Name of the node, or of its output if it has none."""
    op_type: str
    int8: bool
    reason: str
    """The kernel that runs it, or why it is not int8."""


class OperatorCount(NamedTuple):
    """How many nodes of one operator type run in int8, from :func:`summarize`."""

    op_type: str
    int8: int
    total: int
    reasons: dict[str, int]
    """Reasons why nodes are not int8, with the number of nodes for each."""


def inspect(model: str | Path | onnx.ModelProto, engine: Engine) -> list[NodeReport]:
    """Report for each node whether an engine runs it in int8, and if not, why.

    onnxruntime and OpenVINO compile the model for this machine's CPU, and the result is read: onnxruntime's optimized
    graph, OpenVINO's list of kernels. TensorRT needs a GPU, so its documented rules are checked instead.

    Parameters
    ----------
    model : path or onnx.ModelProto
        With QuantizeLinear and DequantizeLinear nodes. In a float model no node is int8.
    engine : {"onnxruntime", "openvino", "tensorrt"}
        The engine to inspect.

    Returns
    -------
    list of NodeReport
        One for each node that computes values from the model's inputs, in the order of the graph. Quantizers,
        constants and computations of shapes are left out.

    Raises
    ------
    InvalidInputError
        For an unknown engine or an invalid model.
    ModelError
        If the engine cannot load the model. Its error is the cause.
    MissingDependencyError
        If openvino is needed and not installed.

    Notes
    -----
    A node counts as int8 if its kernel reads 8-bit values. A node that the engine fuses into another, such as a Relu
    into a convolution, shares the verdict on that node. Both engines choose kernels by CPU, so another machine may give
    another answer.
    """
    check_engine(engine)
    model = load(model)
    with blaming_invalid_model(model):
        graph = read_graph(model)
        nodes = computing_nodes(graph)
        found = ENGINES[engine](model, graph, nodes)
    return [NodeReport(label(node), node.op_type, *found[node_key(node)]) for node in nodes]


def summarize(reports: Iterable[NodeReport]) -> list[OperatorCount]:
    """Count the int8 nodes of each operator type.

    Parameters
    ----------
    reports : iterable of NodeReport
        From :func:`inspect`.

    Returns
    -------
    list of OperatorCount
        In the order in which the operators first occur.
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
