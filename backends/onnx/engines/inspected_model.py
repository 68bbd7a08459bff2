"""Load a model for inspection, select its nodes, and number them so that engines return traceable names."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx

from klquant.errors import InvalidInputError

from ...files import temporary_folder
from ..model.graph import Graph
from ..model.loading import check_graph, read_model, wanted
from ..model.saving import MAX_BYTES, num_bytes, write_model
from .quantizer_nodes import DEQUANTIZE, QUANTIZE, depends_on_input

NO_VALUES = (onnx.TensorProto.INT64, onnx.TensorProto.BOOL, onnx.TensorProto.STRING)
"""Element types of shapes, indices and conditions."""
NOT_COMPUTING = (QUANTIZE, DEQUANTIZE, "Constant", "Identity")


def load(model: str | Path | onnx.ModelProto) -> onnx.ModelProto:
    """Return a model with inferred element types."""
    name = "`model`" if isinstance(model, onnx.ModelProto) else f"`{model}`"
    with wanted(f"{name} must hold an ONNX model"):
        if isinstance(model, onnx.ModelProto):
            check_graph(model)
        else:
            model = read_model(model)
            if not model.graph.output:  # an empty file is an empty model to protobuf
                raise InvalidInputError(f"{name} must hold an ONNX model, got one without outputs")
        if num_bytes(model) > MAX_BYTES:
            return model  # too large for onnx's inference
        return onnx.shape_inference.infer_shapes(model)


def computing_nodes(graph: Graph) -> list[onnx.NodeProto]:
    """Return the nodes to report on."""
    live = depends_on_input(graph)
    return [
        node
        for node in graph.nodes
        if node.op_type not in NOT_COMPUTING
        and live.issuperset(filter(None, node.output))
        and any(name and graph.types.get(name) not in NO_VALUES for name in node.output)
    ]


@contextmanager
def numbered(model: onnx.ModelProto) -> Iterator[Path]:
    """Yield the path of a copy with nodes named #0#, #1#, ..., which engines keep as parts of their own names."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    for number, node in enumerate(copied.graph.node):
        node.name = f"#{number}#"
    with temporary_folder() as folder:
        yield write_model(copied, folder / "model.onnx")
