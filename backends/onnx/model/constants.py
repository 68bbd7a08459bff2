"""Constants behind nodes that only cast, move or reshape them, computed: weights stored in float16 become weights."""

from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from .graph import to_array
from .normal_form import all_nodes
from .optimization import MAX_FOLDED
from .saving import num_bytes

FOLDED = ("Constant", "Identity", "Cast", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze")


def fold_constants(model: onnx.ModelProto) -> None:
    """Replace such nodes by initializers of the same names, in place, as long as those do not take too many bytes."""
    graph = model.graph
    known = {tensor.name: tensor for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    budget = max(MAX_FOLDED, 2 * num_bytes(model))
    for node in list(graph.node):
        if not _is_foldable(node) or outputs & set(node.output) or not all(name in known for name in node.input):
            continue
        values = _computed(model, node, [known[name] for name in node.input])
        budget -= values.nbytes
        if budget < 0:
            break
        known[node.output[0]] = numpy_helper.from_array(values, node.output[0])
        graph.node.remove(node)
    used = outputs.union(*(node.input for node in all_nodes(graph)))
    kept = [tensor for name, tensor in known.items() if name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _is_foldable(node: onnx.NodeProto) -> bool:
    return node.op_type in FOLDED and node.domain in ("", "ai.onnx") and len(node.output) == 1


def _computed(model: onnx.ModelProto, node: onnx.NodeProto, inputs: list[onnx.TensorProto]) -> "np.ndarray[Any, Any]":
    """Return what a node makes of constants."""
    result = onnx.helper.make_empty_tensor_value_info(node.output[0])
    graph = onnx.helper.make_graph([node], "constant", [], [result])
    alone = onnx.helper.make_model(graph, opset_imports=model.opset_import)
    evaluator = ReferenceEvaluator(alone)
    feeds = {tensor.name: to_array(tensor) for tensor in inputs}
    found: Any = evaluator.run(None, feeds)
    return np.asarray(found[0])
