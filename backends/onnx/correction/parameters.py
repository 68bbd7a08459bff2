"""Models with other constants: weights, biases and what normalizations multiply and add."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import numpy_helper

from ..model.graph import copied, read_graph
from ..model.normal_form import all_nodes
from ..model.preparation import Prepared

Array = np.ndarray[Any, Any]


def with_parameters(prepared: Prepared, values: Mapping[tuple[str, int], Array]) -> Prepared:
    """Return a copy of a model in which nodes read other constants.

    Parameters
    ----------
    prepared : Prepared
    values : mapping
        New constants by name of the node and position among its inputs. Other readers of the old constant keep it.
    """
    model = copied(prepared.model)
    nodes = {node.name: node for node in model.graph.node}
    uses = Counter(name for node in all_nodes(model.graph) for name in node.input) + Counter(prepared.graph.outputs)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    taken = prepared.graph.tensors()
    for (name, position), value in values.items():
        node = nodes[name]
        node.input.extend([""] * (position + 1 - len(node.input)))
        old = node.input[position]
        if not old or uses[old] > 1:
            uses[old] -= 1
            node.input[position] = unused(old or f"{node.output[0]}_bias", taken)
            tensor = model.graph.initializer.add()
        else:
            tensor = constants[old]
        tensor.CopyFrom(numpy_helper.from_array(value, node.input[position]))
    return Prepared(model, read_graph(model))


def unused(name: str, taken: set[str]) -> str:
    """Return a name like this one that is not taken, and take it."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name
