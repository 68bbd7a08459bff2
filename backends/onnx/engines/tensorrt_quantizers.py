"""TensorRT's rules on a single QuantizeLinear or DequantizeLinear: its scale, zero point and type."""

from collections.abc import Iterator

import numpy as np
import onnx

from ..model.graph import Graph
from .quantizer_nodes import DEQUANTIZE, INT8, QUANTIZE, Parameters, parameters, type_name, weight_shape

OPERATOR = "https://docs.nvidia.com/deeplearning/tensorrt/operators/docs/Quantize.html"
LAYER = "https://docs.nvidia.com/deeplearning/tensorrt/api/c_api/classnvinfer1_1_1_i_quantize_layer.html"
PARSER = "https://github.com/onnx/onnx-tensorrt/blob/main/onnxOpImporters.cpp (QuantDequantLinearHelper)"


def _found(graph: Graph, node: onnx.NodeProto) -> Parameters | None:
    return parameters(graph, node) if node.op_type in (QUANTIZE, DEQUANTIZE) else None


def constant_scale(graph: Graph, node: onnx.NodeProto) -> Iterator[str]:
    """Use constant scales."""
    found = _found(graph, node)
    if found is not None and found.scale is None:
        yield f"its scale `{node.input[1]}` must be a constant"


def positive_scale(graph: Graph, node: onnx.NodeProto) -> Iterator[str]:
    """Use positive, finite scales."""
    found = _found(graph, node)
    if found is None or found.scale is None:
        return
    values = found.scale.astype(np.float64)
    wrong = values[~(np.isfinite(values) & (values > 0))]
    if wrong.size:
        yield f"its scale must be positive and finite, got {wrong.flat[0]:g}"


def zero_point_zero(graph: Graph, node: onnx.NodeProto) -> Iterator[str]:
    """Quantize symmetrically: the zero point must be a constant 0."""
    found = _found(graph, node)
    if found is not None and found.zero_point is None and len(node.input) > 2:
        yield f"its zero point `{node.input[2]}` must be a constant"
    elif found is not None and found.zero_point is not None and found.zero_point.any():
        yield f"its zero point must be 0, got {found.zero_point[found.zero_point != 0].flat[0]}"


def int8_values(graph: Graph, node: onnx.NodeProto) -> Iterator[str]:
    """Quantize to int8: TensorRT reads uint8 as int8, also where it is ONNX's default without a zero point."""
    found = _found(graph, node)
    if found is not None and found.dtype != INT8:
        default = "" if len(node.input) > 2 else ", ONNX's default without a zero point"
        yield f"its quantized values must be int8, got {type_name(found.dtype)}{default}"


def one_scale_per_channel(graph: Graph, node: onnx.NodeProto) -> Iterator[str]:
    """Use one scale, or one for each slice along an axis, and as many zero points."""
    found = _found(graph, node)
    if found is None or found.scale is None:
        return
    if found.zero_point is not None and found.zero_point.size != found.scale.size:
        yield f"it must have as many zero points as scales, got {found.zero_point.size} and {found.scale.size}"
    shape = weight_shape(graph, node)
    if found.scale.size == 1 or shape is None:
        return
    if not -len(shape) <= found.axis < len(shape):
        yield f"its axis must be one of {len(shape)}, got {found.axis}"
    elif found.scale.size != shape[found.axis]:
        yield f"its axis {found.axis} has {shape[found.axis]} slices, but there are {found.scale.size} scales"


def per_tensor_activations(graph: Graph, node: onnx.NodeProto) -> Iterator[str]:
    """Use a single scale for an activation; only weights may have one per channel."""
    found = _found(graph, node)
    if found is not None and found.scale is not None and found.scale.size > 1 and weight_shape(graph, node) is None:
        yield f"an activation must have one scale, got {found.scale.size}"


RULES = (
    (constant_scale, OPERATOR),
    (positive_scale, LAYER),
    (zero_point_zero, PARSER),
    (int8_values, PARSER),
    (one_scale_per_channel, PARSER),
    (per_tensor_activations, OPERATOR),
)
"""The rules, each with its source."""
