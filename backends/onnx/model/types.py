"""Types and shapes of tensors: inferred by onnx, and behind operators that it does not know by onnxruntime."""

from pathlib import Path

import onnx
import onnxruntime

from .graph import copied
from .saving import write_model


def infer_types(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """Return the model with the types and shapes of its tensors; its large weights are in a file in `folder`."""
    inferred = onnx.shape_inference.infer_shapes(model)
    graph = inferred.graph
    known = {value.name for value in (*graph.value_info, *graph.output) if value.type.WhichOneof("value")}
    unknown = [name for node in graph.node for name in node.output if name and name not in known]
    if not unknown:
        return inferred
    graph.value_info.extend(_ask_onnxruntime(inferred, unknown, folder))
    return onnx.shape_inference.infer_shapes(inferred)


def _ask_onnxruntime(model: onnx.ModelProto, names: list[str], folder: Path) -> list[onnx.ValueInfoProto]:
    model = copied(model)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4  # errors are raised
    path = write_model(model, folder / "typed.onnx")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    tensors = {one.name: one for one in session.get_outputs() if one.type.startswith("tensor(")}
    found = [tensors[name] for name in names if name in tensors]
    types = [one.type.removeprefix("tensor(").removesuffix(")").upper() for one in found]
    return [  # an unknown shape is an empty one, as that of a scalar is
        onnx.helper.make_tensor_value_info(one.name, onnx.TensorProto.DataType.Value(kind), one.shape or None)
        for one, kind in zip(found, types, strict=True)
    ]
