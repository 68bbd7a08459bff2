"""TensorRT's documented rules on the place of quantizers.

A rule takes a graph and a node and yields what is wrong with it. Its docstring restates the source.
"""

from collections.abc import Iterator

import onnx

from ...settings import WEIGHTED
from ..model.graph import MAX_CHAIN, Graph
from ..model.observed import infinite_tensors
from ..model.operators import MOVING, RECTIFIERS, sole_consumer
from .quantizer_nodes import DEQUANTIZE, QUANTIZE, axes_of_scales, constant, dequantizer, follow, label, parameters
from .tensorrt_quantizers import RULES as QUANTIZER_RULES

GUIDE = (
    "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/quantized-types-explicit-quantization.html"
)
PLACEMENT = f"{GUIDE} (Q/DQ Layer-Placement Recommendations)"
PROCESSING = f"{GUIDE} (TensorRT Processing of Q/DQ Networks)"
LIMITATIONS = f"{GUIDE} (Q/DQ Limitations)"
OPERATORS = "https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md"
FOLLOWERS = ("BatchNormalization", *RECTIFIERS)
"""Operators that are fused into the layer before."""
INTEGER_OPERATORS = ("ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "QGemm")


def layer_inputs(graph: Graph, node: onnx.NodeProto) -> Iterator[str]:
    """Quantize both data and weights of a layer, or neither."""
    floats = [name for name in node.input[:2] if not is_dequantized(graph, name)]
    if node.op_type in WEIGHTED and len(floats) == 1:
        yield from (f"its input `{name}` has no QuantizeLinear and DequantizeLinear" for name in floats)


def weight_axis(graph: Graph, node: onnx.NodeProto) -> Iterator[str]:
    """Use weight scales along the output channels: axis 0 of Conv, 1 of ConvTranspose, the output's of a product."""
    axes = axes_of_scales(graph, node) if node.op_type in WEIGHTED else None
    if axes is not None and axes[0] != axes[1]:
        yield f"the scales of its weight must run along axis {axes[1]}, not {axes[0]}"


def float_bias(graph: Graph, node: onnx.NodeProto) -> Iterator[str]:
    """Keep biases in floating point; TensorRT cannot import a DequantizeLinear of int32."""
    if node.op_type in WEIGHTED and len(node.input) > 2 and dequantizer(graph, node.input[2]) is not None:
        yield f"its bias `{node.input[2]}` must be floating point, not quantized"


def contiguous_layer(graph: Graph, node: onnx.NodeProto) -> Iterator[str]:
    """Keep a layer, its batch normalization and its activation together: a quantizer between them prevents fusion."""
    source = _quantized_from(graph, node.input[0]) if node.op_type in FOLLOWERS else None
    if source is not None and source.op_type in (*WEIGHTED, "BatchNormalization"):
        yield f"there must be no quantizer between it and {source.op_type} `{label(source)}`"


def residual_shortcut(graph: Graph, node: onnx.NodeProto) -> Iterator[str]:
    """Quantize the shortcut of a residual sum but not the layer's branch, so that the sum is fused into the layer."""
    if node.op_type != "Add":
        return
    quantized = {name: _quantized_from(graph, name) for name in node.input if is_dequantized(graph, name)}
    from_layers = [one for one in quantized.values() if one is not None and one.op_type in (*WEIGHTED, *FOLLOWERS[:1])]
    if len(set(node.input)) < 2:
        return
    branches = [name for name in node.input if layer_of(graph, name) is not None]
    if not branches and from_layers:
        yield f"the branch of {from_layers[-1].op_type} `{label(from_layers[-1])}` must not be quantized"
    shortcuts = [name for name in node.input if name not in branches[:1]]
    alone = [name for name in branches if sole_consumer(graph, name) is not None]
    int8 = any(is_dequantized(graph, layer.input[0]) for name in alone if (layer := layer_of(graph, name)))
    if int8 and not quantized and constant(graph, shortcuts[0]) is None and shortcuts[0] not in infinite_tensors(graph):
        yield f"its shortcut `{shortcuts[0]}` must be quantized"


def concat_scales(graph: Graph, node: onnx.NodeProto) -> Iterator[str]:
    """Use one scale for all inputs of a concatenation: quantizers move across it only if their scales are equal."""
    sources = [_source(graph, name) for name in node.input] if node.op_type == "Concat" else []
    if not any(sources):
        return
    floats = [name for name, source in zip(node.input, sources, strict=True) if source is None]
    yield from (f"its input `{name}` must be quantized like the others" for name in floats)
    scales = {str(parameters(graph, source)): None for source in sources if source is not None}
    if len(scales) > 1:
        yield f"its inputs must have one scale, got {'; '.join(scales)}"


def both_sides(graph: Graph, node: onnx.NodeProto) -> Iterator[str]:
    """Quantize all inputs and the output of a node without weights, or none; nodes that only move values are exempt."""
    skipped = (*WEIGHTED, *MOVING, "Concat", QUANTIZE, DEQUANTIZE)
    quantized = [name for name in node.input if is_dequantized(graph, name)]
    if node.op_type in skipped or not quantized or any(layer_of(graph, name) for name in node.input):
        return
    floats = [name for name in node.input if name and name not in quantized and graph.is_activation(name)]
    yield from (f"its input `{name}` has no QuantizeLinear and DequantizeLinear" for name in floats)
    if not reaches_quantizer(graph, node.output[0]):
        yield f"its output `{node.output[0]}` has no QuantizeLinear, but its input is quantized"


def integer_operators(graph: Graph, node: onnx.NodeProto) -> Iterator[str]:
    """Use QuantizeLinear and DequantizeLinear instead of operators on integers."""
    if node.op_type.startswith("QLinear") or node.op_type in INTEGER_OPERATORS:
        yield f"TensorRT cannot import {node.op_type}"


def is_dequantized(graph: Graph, name: str) -> bool:
    """Return whether a tensor comes from a DequantizeLinear, perhaps through nodes that only move values."""
    pending, joined = [name], set[str]()
    while pending and len(joined) <= MAX_CHAIN:
        producer = graph.producers.get(one := pending.pop())
        if producer is not None and producer.op_type == "Concat":
            pending += [] if one in joined else producer.input
            joined.add(one)
        elif _source(graph, one) is None:
            return False
    return not pending


def _source(graph: Graph, name: str) -> onnx.NodeProto | None:
    """Return the DequantizeLinear that a tensor comes from, perhaps through nodes that only move values."""
    producer = graph.producers.get(name)
    for _ in range(MAX_CHAIN):
        if producer is None or producer.op_type not in MOVING:
            break
        producer = graph.producers.get(producer.input[0])
    return producer if producer is not None and producer.op_type == DEQUANTIZE else None


def _quantized_from(graph: Graph, name: str) -> onnx.NodeProto | None:
    """Return the node before the Q/DQ pair that a tensor comes from."""
    source = dequantizer(graph, name)
    quantizer = None if source is None else graph.producers.get(source.input[0])
    return None if quantizer is None else graph.producers.get(quantizer.input[0])


def layer_of(graph: Graph, name: str) -> onnx.NodeProto | None:
    """Return the layer that a tensor comes from, perhaps through batch normalization, without quantizers between."""
    producer = graph.producers.get(name)
    while producer is not None and producer.op_type == "BatchNormalization":
        producer = graph.producers.get(producer.input[0])
    return producer if producer is not None and producer.op_type in WEIGHTED else None


def reaches_quantizer(graph: Graph, name: str) -> bool:
    """Return whether a tensor is quantized, perhaps after nodes that only move values or are fused."""
    consumers = follow(graph, name, (*MOVING, *FOLLOWERS)).consumers
    return bool(consumers) and all(node.op_type == QUANTIZE for node in consumers)


RULES = (
    *QUANTIZER_RULES,
    (layer_inputs, PLACEMENT),
    (weight_axis, PROCESSING),
    (float_bias, OPERATORS),
    (contiguous_layer, PLACEMENT),
    (residual_shortcut, PLACEMENT),
    (concat_scales, LIMITATIONS),
    (both_sides, PLACEMENT),
    (integer_operators, OPERATORS),
)
"""The rules, each with its source."""
