"""A graph, read once: who produces what, who consumes it, what is constant. The model is not changed."""

from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import numpy_helper

from klquant.errors import InvalidInputError

MAX_CHAIN = 100  # nodes in a row that are followed, in case that somebody means to keep us busy
FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)


class Graph(NamedTuple):
    """The top level of a model, by tensor name."""

    nodes: list[onnx.NodeProto]
    """In their order, which is topological."""
    initializers: dict[str, onnx.TensorProto]
    producers: dict[str, onnx.NodeProto]
    consumers: dict[str, list[onnx.NodeProto]]
    inputs: list[str]
    """Those that a caller must give."""
    outputs: list[str]
    types: dict[str, int]
    """Element types, of onnx.TensorProto, as far as they are known."""

    def tensors(self) -> set[str]:
        """Return the names of all tensors."""
        return {*self.inputs, *self.initializers, *filter(None, self.producers)}

    def is_activation(self, name: str) -> bool:
        """Return whether this is a floating-point tensor that depends on the model's input."""
        return name not in self.initializers and self.types.get(name) in FLOATS


def read_graph(model: onnx.ModelProto) -> Graph:
    """Return the graph of a model whose shapes and types were inferred."""
    graph = model.graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    consumers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in dict.fromkeys(node.input):
            consumers.setdefault(name, []).append(node)
    values = [*graph.input, *graph.output, *graph.value_info]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return Graph(
        nodes=list(graph.node),
        initializers=initializers,
        producers={name: node for node in graph.node for name in node.output},
        consumers=consumers,
        inputs=[value.name for value in graph.input if value.name not in initializers],
        outputs=[value.name for value in graph.output],
        types=types | {name: tensor.data_type for name, tensor in initializers.items()},
    )


def node_key(node: onnx.NodeProto) -> str:
    """Return the name of the first output in use, which identifies a node: its own name may be missing or shared."""
    return next(filter(None, node.output), "")


def to_array(tensor: onnx.TensorProto) -> "np.ndarray[Any, Any]":
    """Return the values of a constant, which may be less than its type and shape say."""
    try:
        return numpy_helper.to_array(tensor)
    except Exception as error:  # of NumPy and onnx, whatever does not fit
        raise InvalidInputError(f"constant `{tensor.name}` must hold what its type and shape say: {error}") from error


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy, weights included."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy
