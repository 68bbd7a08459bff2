"""Which nodes of a model an engine executes in int8, and why not the others."""

import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, get_args

import onnx

from klquant.errors import InvalidInputError

from .fates import Verdict
from .graph import Graph, read_graph
from .preparing import write_model
from .qdq import DEQUANTIZE, QUANTIZE, depends_on_input, key, label

Engine: TypeAlias = Literal["onnxruntime", "openvino", "tensorrt"]
NO_VALUES = (onnx.TensorProto.INT64, onnx.TensorProto.BOOL, onnx.TensorProto.STRING)
"""Element types of shapes, indices and conditions."""
NOT_COMPUTING = (QUANTIZE, DEQUANTIZE, "Constant", "Identity")


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
        For another engine, or a file that holds no ONNX model.
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
    if engine not in get_args(Engine):
        raise InvalidInputError(f"`engine` must be one of {', '.join(get_args(Engine))}, got {engine!r}")
    model = load(model)
    graph = read_graph(model)
    found = _verdicts(model, graph, engine)
    return [NodeReport(label(node), node.op_type, *found[key(node)]) for node in computing_nodes(graph)]


def summarize(reports: Iterable[NodeReport]) -> list[OperatorCount]:
    """Count the reports by operator, in the order in which operators first occur."""
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


def load(model: str | Path | onnx.ModelProto) -> onnx.ModelProto:
    """Return a model with the element types of its tensors, as far as they can be inferred."""
    if not isinstance(model, onnx.ModelProto):
        try:
            model = onnx.load(model)
        except OSError:
            raise
        except Exception as error:  # protobuf's, which onnx does not wrap
            raise InvalidInputError(f"`{model}` must hold an ONNX model, got something else: {error}") from error
    if model.ByteSize() > onnx.checker.MAXIMUM_PROTOBUF:
        return model  # onnx's inference takes no more
    return onnx.shape_inference.infer_shapes(model)


def computing_nodes(graph: Graph) -> list[onnx.NodeProto]:
    """Return the nodes that are inspected."""
    live = depends_on_input(graph)
    return [
        node
        for node in graph.nodes
        if node.op_type not in NOT_COMPUTING
        and live.issuperset(filter(None, node.output))
        and any(graph.types.get(name) not in NO_VALUES for name in node.output)
    ]


def _verdicts(model: onnx.ModelProto, graph: Graph, engine: Engine) -> dict[str, Verdict]:
    nodes = computing_nodes(graph)
    if engine == "tensorrt":
        from .tensorrt_engine import verdicts as by_rules

        return by_rules(model, graph, nodes)
    if engine == "openvino":
        from .openvino_engine import verdicts
    else:
        from .onnxruntime_engine import verdicts
    with tempfile.TemporaryDirectory(prefix="klquant-") as folder:
        path = Path(folder) / "model.onnx"
        write_numbered(model, path)
        return verdicts(path, graph, nodes)


def write_numbered(model: onnx.ModelProto, path: Path) -> None:
    """Write a model with names of nodes that are found again in names made of them: #0#, #1#, ..."""
    numbered = onnx.ModelProto()
    numbered.CopyFrom(model)
    for number, node in enumerate(numbered.graph.node):
        node.name = f"#{number}#"
    write_model(numbered, path)
