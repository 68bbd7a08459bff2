"""Layers that gain no speed from INT8 in TensorRT, by the rules of NVIDIA's own quantizer."""

from pathlib import Path
from typing import Any

import onnx

from ..model.graph import Graph
from ..model.operators import attribute, has_constant_weight
from ..model.preparation import Prepared, prepare

TILE = 16  # channels that a kernel handles at a time; half of them still fit in some


def slow_in_tensorrt(model: onnx.ModelProto | str | Path | Prepared, *, attention: bool = False) -> dict[str, str]:
    """Return the layers that NVIDIA's quantizer leaves in floating point, for `exclude` of :func:`quantize`.

    Parameters
    ----------
    model : onnx.ModelProto, path or Prepared
        A float model, as :func:`quantize` takes it.
    attention : bool
        Whether to add all products of two activations, as NVIDIA's option ``disable_mha_qdq`` does for those of an
        attention.

    Returns
    -------
    dict
        Why, by the name of the node.

    Raises
    ------
    InvalidInputError
        For a model that :func:`prepare` rejects.

    Notes
    -----
    A convolution is slow if it has fewer than 16 input or output channels, with exceptions for multiples of 8; a
    product, if its result has a single row or column. Sizes that the model leaves free do not count. The rules were not
    measured here, because no GPU was available.
    Source: NVIDIA ModelOpt, modelopt/onnx/quantization/graph_utils.py, `find_nodes_from_convs_to_exclude`,
    `find_nodes_from_matmul_to_exclude`.
    """
    prepared = prepare(model)
    graph, shapes = prepared.graph, _shapes(prepared.model)
    found = {}
    for node in graph.nodes:
        if node.op_type == "Conv" and _has_few_channels(graph, node):
            found[node.name] = f"it has fewer than {TILE} input or output channels"
        elif node.op_type in ("MatMul", "Gemm") and _is_thin(graph, node, shapes.get(node.output[0], [])):
            found[node.name] = "its result has a single row or column"
        elif attention and node.op_type == "MatMul" and all(map(graph.is_activation, node.input)):
            found[node.name] = "it is a product of two activations"
    return found


def _has_few_channels(graph: Graph, node: onnx.NodeProto) -> bool:
    if not has_constant_weight(graph, node):
        return False
    outputs, inputs, *kernel = graph.initializers[node.input[1]].dims
    if min(outputs, inputs) >= TILE:
        return False
    if attribute(node, "group", 1) != 1:
        return bool(outputs % 8 != 0 or min(kernel) < 3)
    fits = outputs % 8 == 0 or inputs % 8 == 0
    first = node.input[0] in graph.inputs
    return not (fits and len(set(kernel)) == 1 and (first or max(outputs, inputs) >= TILE))


def _is_thin(graph: Graph, node: onnx.NodeProto, shape: list[Any]) -> bool:
    if has_constant_weight(graph, node):
        return len(shape) < 3 and 1 in shape
    return 1 in shape[-2:] and len(shape) > 1


def _shapes(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Return the sizes of tensors by name, 0 for those that are free."""
    values = [*model.graph.value_info, *model.graph.output]
    return {value.name: [size.dim_value for size in value.type.tensor_type.shape.dim] for value in values}
