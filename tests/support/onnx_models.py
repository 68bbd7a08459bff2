"""Small ONNX models, written as text, and their outputs in onnxruntime."""

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper, parser


def build(inputs, outputs, body, *, opset=17, **constants):
    """Return a checked model with inferred shapes and named nodes. Constants are arrays, or shapes of random ones."""
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> graph ({inputs}) => ({outputs}) {{ {body} }}'
    model, rng = parser.parse_model(text), np.random.default_rng(0)
    for name, value in constants.items():
        array = rng.normal(size=value).astype(np.float32) if isinstance(value, tuple) else np.asarray(value)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    for k, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type.lower()}{k}"
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")  # "float y" is a scalar to the parser
    model = onnx.shape_inference.infer_shapes(model)
    onnx.checker.check_model(model)
    return model


def run(model, *, optimize=False, **feeds):
    """Return the outputs by name. By default without optimizations, so that the nodes run as written."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip((output.name for output in session.get_outputs()), session.run(None, feeds), strict=True))


def run_all(model, **feeds):
    """Return every tensor of a graph by name."""
    widened = onnx.ModelProto()
    widened.CopyFrom(model)
    known = {output.name for output in model.graph.output}
    names = [name for node in model.graph.node for name in node.output if name and name not in known]
    widened.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return run(widened, **feeds)


def array(model, name):
    """Return a constant of a model."""
    return next(numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name == name)
