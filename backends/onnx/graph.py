"""A graph, read once: who produces what, who consumes it, what is constant. The model is not changed."""

from typing import NamedTuple

import onnx

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
