"""Models in float16, which onnxruntime computes in float32 on most CPUs: the casts that it inserts go again."""

import onnx

_INSERTED = "InsertedPrecisionFreeCast_"  # before the names of these casts and of what they give
_HALF = onnx.TensorProto.FLOAT16


def casts_halves(model: onnx.ModelProto) -> bool:
    """Return whether a model in float16 has casts of its own, which could not be told from onnxruntime's."""
    graph = model.graph
    types = {tensor.data_type for tensor in graph.initializer}
    types |= {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    targets = {a.i for node in graph.node if node.op_type == "Cast" for a in node.attribute if a.name == "to"}
    return _HALF in types | targets and bool(targets)


def without_inserted_casts(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model as it was in float16: tensors have the names again that onnxruntime's casts were named after."""
    graph = model.graph
    for node in [node for node in graph.node if node.op_type == "Cast" and node.name.startswith(_INSERTED)]:
        graph.node.remove(node)
    for value in [value for value in graph.value_info if value.name.startswith(_INSERTED)]:
        graph.value_info.remove(value)
    for node in graph.node:
        node.input[:] = [name.removeprefix(_INSERTED) for name in node.input]
        node.output[:] = [name.removeprefix(_INSERTED) for name in node.output]
    return model
