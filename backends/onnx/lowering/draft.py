"""A copy of a model while its nodes are replaced."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ..correction.parameters import unused
from ..feeds import Array
from ..model.graph import Graph, copied, read_graph, to_array
from ..model.normal_form import keep_body_inputs
from ..model.preparation import Prepared


class Draft:
    """A copy of a model while its nodes are replaced; `finished` returns the result."""

    def __init__(self, prepared: Prepared) -> None:
        self.graph: Graph = keep_body_inputs(prepared.graph)
        self._prepared = prepared
        self._constants: list[onnx.TensorProto] = []
        self._names = prepared.graph.tensors() | {node.name for node in prepared.graph.nodes}
        self._nodes: dict[str, list[onnx.NodeProto]] = {}
        self._types: dict[str, int] = {}

    def scalar(self, name: str) -> float | None:
        """Return the value of a float32 constant with a single element."""
        values = self.vector(name)
        return float(values.item()) if values is not None and values.size == 1 and np.isfinite(values).all() else None

    def vector(self, name: str) -> "Array | None":
        """Return the values of a float32 constant."""
        tensor = self.graph.initializers.get(name)
        return None if tensor is None or tensor.data_type != onnx.TensorProto.FLOAT else to_array(tensor)

    def constant(self, name: str, value: Any) -> str:
        """Add a float32 constant with a name like this, and return the name."""
        name = self.unused(name)
        self._constants.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
        return name

    def unused(self, name: str) -> str:
        """Return a name like this that is not in use, and take it."""
        return unused(name, self._names)

    def node(self, kind: str, inputs: list[str], output: str, name: str = "", **attributes: Any) -> onnx.NodeProto:
        """Return a new node, whose output has the type float32."""
        self._types[output] = onnx.TensorProto.FLOAT
        return helper.make_node(kind, inputs, [output], name or self.unused(f"{output}/{kind}"), **attributes)

    def replace(self, node: onnx.NodeProto, new: Iterable[onnx.NodeProto]) -> None:
        """Put other nodes in the place of one."""
        if (nodes := list(new)) != [node]:
            self._nodes[node.name] = nodes

    def finished(self) -> Prepared:
        """Return the model; the given one if nothing was replaced."""
        if not self._nodes:
            return self._prepared
        model = copied(self._prepared.model)
        graph = model.graph
        nodes = [new for node in self.graph.nodes for new in self._nodes.get(node.name, [node])]
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(copies)
        known = {value.name for value in (*graph.value_info, *graph.output)}
        graph.value_info.extend(
            helper.make_tensor_value_info(name, kind, None) for name, kind in self._types.items() if name not in known
        )
        graph.initializer.extend(self._constants)
        return Prepared(model, read_graph(model))
