"""Why onnxruntime leaves a node in floating point: the rules of its graph transformers.

The verdict comes from onnxruntime itself; these rules only explain it. They were measured on onnxruntime 1.32 on x86.
"""

from typing import Any, NamedTuple

import numpy as np
import onnx

from ..model.graph import Graph
from ..model.operators import MOVING as _MOVING
from ..model.operators import RECTIFIERS, attribute
from .quantizer_nodes import INT32, axes_of_scales, constant, dequantizer, follow, label, listed, parameters, type_name

LAYERS = ("Conv", "Gemm", "MatMul")
MOVING = (*_MOVING, "DepthToSpace", "Slice", "Split", "Gather", "Expand", "Tile", "ReduceMax", "ReduceMin", "Resize")
COMPUTING = (
    *LAYERS,
    *("Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid", "Softmax"),
)
TWO_OPERANDS = (*LAYERS, "Add", "Mul")


class Case(NamedTuple):
    """A node that stayed in floating point."""

    graph: Graph
    node: onnx.NodeProto
    optimized: Graph
    """The graph that onnxruntime runs."""
    executed: onnx.NodeProto | None
    """The node that onnxruntime runs for it, if found."""


def why_float(case: Case) -> str:
    """Return the first reason that holds."""
    rules = (_rectifier, _kernel, _inputs, _factors, _weight_axis, _output, _bias, _moved, _types)
    return next(filter(None, (rule(case) for rule in rules)), "onnxruntime did not fuse it with its quantizers")


def _rectifier(case: Case) -> str:
    if case.node.op_type not in RECTIFIERS:
        return ""
    tail = follow(case.graph, case.node.output[0], RECTIFIERS)
    quantizer = tail.quantizer(case.graph)
    if quantizer is None:
        return "it has no int8 kernel, and no QuantizeLinear follows that could replace it"
    return _not_cut(case.graph, case.node, quantizer) or "it is not between a DequantizeLinear and a QuantizeLinear"


def _kernel(case: Case) -> str:
    known = case.node.op_type in (*COMPUTING, *MOVING)
    return "" if known else f"onnxruntime has no int8 kernel for {case.node.op_type}"


def _inputs(case: Case) -> str:
    """Name an input that is not quantized."""
    graph, node = case.graph, case.node
    count = {"Concat": len(node.input)}.get(node.op_type, 2 if node.op_type in TWO_OPERANDS else 1)
    floats = [name for name in node.input[:count] if dequantizer(graph, name) is None]
    if node.op_type in ("Conv", "Gemm") and _quantizes_weight(case):
        floats = [name for name in floats if name != node.input[1]]
    return f"its input `{floats[0]}` has no DequantizeLinear" if floats else ""


def _quantizes_weight(case: Case) -> bool:
    """Return whether onnxruntime itself quantizes a constant float weight."""
    graph, node = case.graph, case.node
    is_constant = constant(graph, node.input[1]) is not None
    bias_too = len(node.input) > 2 and dequantizer(graph, node.input[2]) is not None
    quantizer = follow(graph, node.output[0], RECTIFIERS).quantizer(graph)
    return is_constant and not bias_too and (node.op_type == "Conv" or quantizer is not None)


def _factors(case: Case) -> str:
    factors: dict[str, Any] = {name: attribute(case.node, name, 1.0) for name in ("alpha", "beta")}
    other = [f"{name} is {value:g}" for name, value in factors.items() if value != 1]
    return f"{other[0]}, but the int8 kernel supports only 1" if case.node.op_type == "Gemm" and other else ""


def _weight_axis(case: Case) -> str:
    return _scales_misplaced(case.graph, case.node) if case.node.op_type in ("Gemm", "MatMul") else ""


def _scales_misplaced(graph: Graph, node: onnx.NodeProto) -> str:
    axes = axes_of_scales(graph, node)
    if axes is None or axes[0] == axes[1]:
        return ""
    return f"the scales of its weight run along axis {axes[0]}, not along {axes[1]}, the axis of output channels"


def _output(case: Case) -> str:
    graph, node = case.graph, case.node
    passed = RECTIFIERS if node.op_type in MOVING else (*RECTIFIERS, "MaxPool")
    tail = follow(graph, node.output[0], passed)
    if (quantizer := tail.quantizer(graph)) is not None:
        cuts = [_not_cut(graph, other, quantizer) for other in tail.between if other.op_type in RECTIFIERS]
        return next(filter(None, cuts), "")
    if node.op_type == "MatMul" or (node.op_type == "Gemm" and not _float_bias(graph, node)):
        return ""
    if tail.tensor in graph.outputs:
        who = "it is an output of the model" + (", and read by others" if tail.consumers else "")
    else:
        who = f"{listed(tail.consumers)} read" + ("s it" if len(tail.consumers) == 1 else " it")
    bias = ", and its bias is not a DequantizeLinear of int32" if node.op_type == "Gemm" else ""
    return f"its output has no QuantizeLinear as its only reader: {who}{bias}"


def _float_bias(graph: Graph, node: onnx.NodeProto) -> bool:
    return len(node.input) > 2 and dequantizer(graph, node.input[2]) is None


def _not_cut(graph: Graph, rectifier: onnx.NodeProto, quantizer: onnx.NodeProto) -> str:
    """Return what is wrong if a quantizer does not clip all that the rectifier before it clips."""
    low, high = _range(graph, rectifier)
    found = parameters(graph, quantizer)
    least, largest = found.bounds()
    if low <= least and largest <= high:
        return ""
    where = f"{rectifier.op_type} `{label(rectifier)}` comes before its QuantizeLinear"
    if low > least:
        return f"{where} ({found}), whose range goes down to {least:.6g}, below {low:g}"
    return f"{where}, whose range goes up to {largest:.6g}, above {high:g}"


def _range(graph: Graph, rectifier: onnx.NodeProto) -> tuple[float, float]:
    if rectifier.op_type == "Relu":
        return 0.0, np.inf
    given = [constant(graph, name) if name else None for name in rectifier.input[1:3]]
    values: list[Any] = [*(None if bound is None else float(bound) for bound in given), None, None]
    low: Any = attribute(rectifier, "min", values[0])
    high: Any = attribute(rectifier, "max", values[1])
    return (-np.inf if low is None else low), (np.inf if high is None else high)


def _bias(case: Case) -> str:
    return _bias_misfit(case.graph, case.node) if case.node.op_type == "Conv" else ""


def _bias_misfit(graph: Graph, node: onnx.NodeProto) -> str:
    """Return what is wrong with a quantized bias: its integers must have the scale of the products."""
    found = [dequantizer(graph, name) for name in node.input[:3]]
    if len(found) < 3 or found[0] is None or found[1] is None or found[2] is None:
        return ""
    data, weight, bias = (parameters(graph, one) for one in found if one is not None)
    if bias.dtype != INT32 or data.scale is None or weight.scale is None or bias.scale is None:
        return "its bias comes from a DequantizeLinear, but not of int32 with constant scales"
    equal = np.allclose(bias.scale, data.scale * weight.scale, rtol=1e-5, atol=0)
    return "" if equal else "the scale of its int32 bias is not the product of the scales of its input and its weight"


def why_wrong(graph: Graph, node: onnx.NodeProto) -> str:
    """Return why an int8 kernel computes something else than the model, which onnxruntime does not report."""
    if node.op_type == "Gemm" and (reason := _bias_misfit(graph, node)):
        return reason
    return _scales_misplaced(graph, node) if node.op_type in ("Conv", "Gemm") else ""


def _moved(case: Case) -> str:
    graph, node = case.graph, case.node
    before = dequantizer(graph, node.input[0])
    after = follow(graph, node.output[0], RECTIFIERS).quantizer(graph)
    if node.op_type not in MOVING or before is None or after is None:
        return ""
    here, there = parameters(graph, before), parameters(graph, after)
    if here.same_grid(there):
        return ""
    return f"it only moves values, but the quantizers of its input and its output differ: {here}, {there}"


def _types(case: Case) -> str:
    """Compare the types of inputs and output; on x86 onnxruntime turns int8 into uint8, but not everywhere."""
    written = _both_types(case.graph, case.node)
    executed = (_both_types(case.optimized, case.executed) if case.executed is not None else []) or written
    if len(set(executed)) > 1:
        differ = f"its inputs and output must have one type, but are {', '.join(executed)}"
        why = f": on x86 onnxruntime turns {written[0]} into uint8, but not where several nodes read it; use uint8"
        return differ + (why if len(set(written)) == 1 else "")
    wide = set(executed) - {"int8", "uint8"}
    return f"its input and output are {wide.pop()}, not 8 bits wide" if wide else ""


def _both_types(graph: Graph, node: onnx.NodeProto) -> list[str]:
    """Return the types of the quantized input and output activations."""
    count = 1 if node.op_type in LAYERS else len(node.input)
    before = [dequantizer(graph, name) for name in node.input[:count]]
    after = follow(graph, node.output[0], (*RECTIFIERS, "MaxPool")).quantizer(graph)
    return [type_name(parameters(graph, one).dtype) for one in (*before, after) if one is not None]
