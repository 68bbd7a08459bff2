"""The graph of a model, indexed by name: producers, consumers, constants and types."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import numpy_helper

from klquant.errors import InvalidInputError

MAX_CHAIN = 100  # nodes in a row that are followed: untrusted models may have endless chains
FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)


class Graph(NamedTuple):
    """The top level of a model; dicts are keyed by tensor name."""

    nodes: list[onnx.NodeProto]
    """In topological order."""
    initializers: dict[str, onnx.TensorProto]
    producers: dict[str, onnx.NodeProto]
    consumers: dict[str, list[onnx.NodeProto]]
    inputs: list[str]
    """Inputs that are not initializers."""
    outputs: list[str]
    types: dict[str, int]
    """Element types of onnx.TensorProto, where known."""
    ranks: Mapping[str, int] = {}
    """Numbers of dimensions, where known."""

    def tensors(self) -> set[str]:
        """Return the names of all tensors."""
        return {*self.inputs, *self.initializers, *filter(None, self.producers)}

    def is_activation(self, name: str) -> bool:
        """Return whether this is a floating-point tensor and not a constant."""
        return name not in self.initializers and self.types.get(name) in FLOATS


def read_graph(model: onnx.ModelProto) -> Graph:
    """Return the graph of a model with inferred shapes and types."""
    graph = model.graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    consumers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in dict.fromkeys(node.input):
            consumers.setdefault(name, []).append(node)
    values = [*graph.input, *graph.output, *graph.value_info]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    shapes = {value.name: value.type.tensor_type.shape for value in values if value.type.tensor_type.HasField("shape")}
    return Graph(
        nodes=list(graph.node),
        initializers=initializers,
        producers={name: node for node in graph.node for name in node.output},
        consumers=consumers,
        inputs=[value.name for value in graph.input if value.name not in initializers],
        outputs=[value.name for value in graph.output],
        types=types | {name: tensor.data_type for name, tensor in initializers.items()},
        ranks={name: len(shape.dim) for name, shape in shapes.items()}
        | {name: len(tensor.dims) for name, tensor in initializers.items()},
    )


def node_key(node: onnx.NodeProto) -> str:
    """Return the name of the first output in use, which identifies a node: its own name may be missing or shared."""
    return next(filter(None, node.output), "")


def to_array(tensor: onnx.TensorProto) -> "np.ndarray[Any, Any]":
    """Return the values of a constant; raise InvalidInputError if they do not fit its type and shape."""
    try:
        return numpy_helper.to_array(tensor)
    except Exception as error:  # NumPy and onnx raise many kinds
        raise InvalidInputError(f"constant `{tensor.name}` must fit its type and shape, got: {error}") from error


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy, weights included."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy
