"""Changes that mean nothing, but let engines take a model or run more of it in INT8."""

import numpy as np
import onnx
from onnx import helper, numpy_helper

from klquant.errors import InvalidInputError

from .normal_form import model_nodes
from .optimization import MAX_FOLDED

MIN_IR = 7  # goes with opset 13; since 4, initializers need not be inputs too
_JOINED = "MatMulAddFusion"  # of onnxruntime: part of the names of products that it joined with a sum


def free_weights(model: onnx.ModelProto) -> None:
    """Remove the initializers from the inputs, where a caller could replace them."""
    weights = {tensor.name for tensor in model.graph.initializer}
    for value in [value for value in model.graph.input if value.name in weights]:
        model.graph.input.remove(value)
    if 0 < model.ir_version < MIN_IR:
        model.ir_version = MIN_IR


def free_sizes(model: onnx.ModelProto) -> None:
    """Clear sizes that PaddlePaddle writes as -1 or "?". They are free, but onnxruntime takes those alike as equal."""
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim if value.type.tensor_type.HasField("shape") else ():
            if size.dim_value < 0 or (size.dim_param and not any(map(str.isalpha, size.dim_param))):
                size.Clear()


def rank_outputs(model: onnx.ModelProto) -> None:
    """Infer the shapes of outputs that have none, which onnx's checker and converter demand."""
    outputs = [value for value in model.graph.output if value.type.HasField("tensor_type")]
    if all(value.type.tensor_type.HasField("shape") for value in outputs):
        return
    inferred = {value.name: value for value in onnx.shape_inference.infer_shapes(model).graph.output}
    for value in outputs:
        value.CopyFrom(inferred[value.name])


def make_dense(model: onnx.ModelProto) -> None:
    """Replace sparse weights, which shape inference and most engines do not know, by dense ones."""
    graph = model.graph
    graph.initializer.extend(_dense(sparse, sparse.values.name) for sparse in graph.sparse_initializer)
    del graph.sparse_initializer[:]
    for node in model_nodes(model):
        for entry in node.attribute:
            if node.op_type == "Constant" and entry.name == "sparse_value":
                entry.CopyFrom(helper.make_attribute("value", _dense(entry.sparse_tensor, "")))


def _dense(sparse: onnx.SparseTensorProto, name: str) -> onnx.TensorProto:
    values, places = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    size = int(np.prod(sparse.dims, dtype=np.float64))
    if size > max(MAX_FOLDED, 2 * sparse.ByteSize()):
        raise InvalidInputError(f"expected a sparse constant of at most {MAX_FOLDED} values, got `{name}` of {size}")
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    if places.ndim == 2:
        dense[tuple(places.T)] = values
    else:
        dense.flat[places] = values
    return numpy_helper.from_array(dense, name)


def drop_default_dilations(model: onnx.ModelProto) -> None:
    """Leave out what means nothing and what onnxruntime's INT8 kernel does not know."""
    for node in model_nodes(model):
        for entry in [entry for entry in node.attribute if node.op_type == "AveragePool" and entry.name == "dilations"]:
            if set(entry.ints) == {1}:
                node.attribute.remove(entry)


def name_apart(model: onnx.ModelProto) -> None:
    """Remove names that several nodes have, which onnxruntime refuses, and omitted inputs at the end."""
    seen = set[str]()
    for node in model.graph.node:
        if node.name in seen:
            node.name = ""
        seen.add(node.name)
    for node in model_nodes(model):
        while node.input and not node.input[-1]:
            del node.input[-1]


def split_sums(model: onnx.ModelProto, like: onnx.ModelProto) -> onnx.ModelProto:
    """Split again each product that onnxruntime joined with a sum of activations: INT32 biases must be constants."""
    constants = {tensor.name for tensor in model.graph.initializer}
    before = {name: node for node in like.graph.node for name in node.output}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        joined = node.op_type == "Gemm" and _JOINED in node.name and node.input[2] not in constants
        product = _product(node, before) if joined else None
        if product is None:
            nodes.append(node)
            continue
        nodes.append(helper.make_node("MatMul", node.input[:2], product.output, product.name))
        sum_name = before[node.output[0]].name
        nodes.append(helper.make_node("Add", [product.output[0], node.input[2]], node.output, sum_name))
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    return model


def _product(gemm: onnx.NodeProto, before: dict[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    """Return the product that was joined with a sum in this Gemm."""
    add = before.get(gemm.output[0])
    addends = [before.get(name) for name in (add.input if add is not None else ()) if name != gemm.input[2]]
    return next((node for node in addends if node is not None and node.op_type == "MatMul"), None)
