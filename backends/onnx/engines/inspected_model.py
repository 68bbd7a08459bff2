"""A model as it is inspected: its types, its nodes of interest, and a copy in which nodes are found again."""

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
    """Return a model with the element types of its tensors, as far as they can be inferred."""
    name = "`model`" if isinstance(model, onnx.ModelProto) else f"`{model}`"
    with wanted(f"{name} must hold an ONNX model"):
        if isinstance(model, onnx.ModelProto):
            check_graph(model)
        else:
            model = read_model(model)
            if not model.graph.output:  # an empty file is an empty model to protobuf
                raise InvalidInputError(f"{name} must hold an ONNX model, got one without outputs")
        if num_bytes(model) > MAX_BYTES:
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
        and any(name and graph.types.get(name) not in NO_VALUES for name in node.output)
    ]


@contextmanager
def numbered(model: onnx.ModelProto) -> Iterator[Path]:
    """Give the path of a copy whose nodes are named #0#, #1#, ...: found again in names that engines make of them."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    for number, node in enumerate(copied.graph.node):
        node.name = f"#{number}#"
    with temporary_folder() as folder:
        yield write_model(copied, folder / "model.onnx")
