"""Rules of onnxruntime, which runs an operator in INT8 only between dequantizers and a quantizer."""

from collections.abc import Collection, Iterable

import numpy as np
import onnx

from ...settings import WEIGHTED
from ..model.graph import MAX_CHAIN, Graph, to_array
from ..model.operators import (
    COMBINING,
    CURVES,
    MOVING,
    RECTIFIERS,
    activations,
    attribute,
    channel_bias,
    has_constant_weight,
    is_excluded,
    rectified,
    sole_consumer,
)
from ..model.signs import ONNX
from .first_layers import FASTER, first_layers
from .plan import EVERYONE, Plan, add_layer, share_moved, why_not

NO_KERNEL = ("ConvTranspose",)  # onnxruntime has no INT8 kernel for these
FLOAT_OUTPUT = ("Gemm", "MatMul")  # onnxruntime's INT8 kernels for these can output floating point
BETWEEN = (*MOVING, "AveragePool", "GlobalAveragePool", *CURVES, *COMBINING)  # these have INT8 kernels
OPERATIONS = ("Add", "Mul")
"""Operators whose INT8 kernels also take a constant."""
SELECTING = ("Slice", "Split", "Gather", "DepthToSpace", "Resize", "Tile", "ReduceMax", "ReduceMin")
"""Operators that select values or repeat them, in INT8 behind INT8 kernels: their results are on the same grid."""
IDLE = ("Softmax", *(name for name in MOVING if name != "MaxPool"))  # INT8 only if an INT8 kernel reads the result


def operators(
    graph: Graph, thresholds: Iterable[str], exclude: tuple[str, ...], products: Collection[str] = ()
) -> Plan:
    """Quantize inputs and output of each layer, and of the operators between layers that have INT8 kernels.

    Nodes in floating point read a tensor before its quantizer, unless an INT8 kernel computes it: onnxruntime fuses
    such a kernel only if the quantizer is the only reader of its output.

    `products` are names of nodes that may multiply by a quantized constant. Others would join parts of a polynomial,
    or of a normalization, that are better computed in floating point.
    """
    known = set(thresholds)
    plan = Plan({}, {}, [], {})
    int8: list[onnx.NodeProto] = []
    floats = set(first_layers(graph))
    for node in (node for node in graph.nodes if node.op_type in WEIGHTED and node.domain in ONNX):
        reason = why_not(graph, node, known, exclude) or _why_no_kernel(graph, node, known)
        if reason := reason or (FASTER if node.name in floats else ""):
            plan.skipped[node.name] = reason
        else:
            add_layer(graph, plan, node)
            _quantize_around(graph, plan, node, known)
            int8.append(node)
    computed = {name for node in int8 if not _gives_floats(graph, node) for name in _outputs(graph, node)}
    for node in (node for node in graph.nodes if node.op_type in (*BETWEEN, *SELECTING)):
        possible = _all_quantized(graph, plan, node) and _has_kernel(node) and not is_excluded(graph, node, exclude)
        possible = possible and (node.op_type != "MaxPool" or _beside_convolution(graph, node))
        if possible and node.op_type in OPERATIONS and _has_operand(graph, node):
            wanted = node.name in products or (node.op_type == "Add" and _is_scalar(graph, node))
            possible = wanted and computed.issuperset(activations(graph, node))
        selects = node.op_type in SELECTING  # then it needs no thresholds of its own
        if possible and (node.input[0] in computed if selects else _outputs(graph, node)[0] in known):
            _quantize_around(graph, plan, node, known)
            int8.append(node)
            if node.op_type not in (*IDLE, *SELECTING) or node.input[0] in computed:
                computed.update(_outputs(graph, node))
    names = {node.name for node in int8}
    may = [
        node
        for node in graph.nodes
        if node.name in names or (node.op_type == "Softmax" and _all_quantized(graph, plan, node))
    ]
    used = _readers(graph, plan, may)
    plan = plan._replace(
        readers={name: used[name] for name in plan.readers if used.get(name)},
        operands={node.name for node in int8 if node.op_type in OPERATIONS and _has_operand(graph, node)},
    )
    share_moved(graph, plan)
    for node in (node for node in int8 if node.op_type in SELECTING and node.input[0] in plan.readers):
        plan.shared.append((node.input[0], *(name for name in node.output if name in plan.readers)))
    return plan


def _readers(graph: Graph, plan: Plan, int8: list[onnx.NodeProto]) -> dict[str, set[str]]:
    """Return who reads each dequantized tensor, given the nodes that can compute in INT8, in their order."""
    forced: set[str] = set()
    for node in int8:
        idle = node.op_type in (*IDLE, *SELECTING) and node.input[0] not in forced
        if not idle and not _gives_floats(graph, node):
            forced.update(output for output in _outputs(graph, node) if output in plan.readers)
    used: dict[str, set[str]] = {name: {EVERYONE} for name in forced}
    for node in reversed(int8):
        output = rectified(graph, node.output[0])
        if node.op_type in SELECTING or (node.op_type in IDLE and not _leads_to(graph, output, used)):
            continue
        for name in activations(graph, node):
            used.setdefault(name, set()).add(node.name)
    given = {rectified(graph, node.output[0]) for node in int8 if node.op_type not in SELECTING}
    return {
        name: {EVERYONE} if name in forced | given or _all_read(graph, name, readers) else readers
        for name, readers in used.items()
    }


def _outputs(graph: Graph, node: onnx.NodeProto) -> list[str]:
    """Return the results of a node that an engine would quantize."""
    return list(filter(None, node.output)) if node.op_type in SELECTING else [rectified(graph, node.output[0])]


def _leads_to(graph: Graph, name: str, used: Iterable[str]) -> bool:
    """Return whether a tensor is quantized, perhaps behind nodes that move it: onnxruntime moves its quantizer up."""
    for _ in range(MAX_CHAIN):
        reader = sole_consumer(graph, name)
        if name in used or reader is None or reader.op_type not in MOVING:
            break
        name = reader.output[0]
    return name in used


def _all_read(graph: Graph, name: str, readers: set[str]) -> bool:
    """Return whether nothing else reads a tensor."""
    return name not in graph.outputs and readers.issuperset(node.name for node in graph.consumers.get(name, []))


def _gives_floats(graph: Graph, node: onnx.NodeProto) -> bool:
    """Return whether a product in INT8 can leave its output in floating point."""
    bias = graph.initializers.get(node.input[2]) if len(node.input) > 2 else None
    fits = len(node.input) < 3 or (bias is not None and len(bias.dims) == 1)
    return node.op_type in FLOAT_OUTPUT and fits and rectified(graph, node.output[0]) == node.output[0]


def _quantize_around(graph: Graph, plan: Plan, node: onnx.NodeProto, known: set[str]) -> None:
    """Quantize the inputs and the output of a node; a product that is a graph output stays in floating point."""
    outputs = _outputs(graph, node)
    optional = node.op_type in FLOAT_OUTPUT and (outputs[0] in graph.outputs or outputs[0] not in known)
    for name in (*activations(graph, node), *([] if optional else outputs)):
        plan.readers[name] = {EVERYONE}


def _why_no_kernel(graph: Graph, node: onnx.NodeProto, known: set[str]) -> str:
    output = rectified(graph, node.output[0])
    if halves := [name for name in activations(graph, node) if graph.types[name] == onnx.TensorProto.FLOAT16]:
        return f"onnxruntime has no INT8 kernel for its input `{halves[0]}` of float16; convert the model to float32"
    if node.op_type in NO_KERNEL:
        return f"onnxruntime has no INT8 kernel for {node.op_type}"
    if any(attribute(node, name, 1.0) != 1.0 for name in ("alpha", "beta")):
        return "onnxruntime has no INT8 kernel for a Gemm with alpha or beta other than 1"
    if len(node.input) > 2 and node.input[2] and has_constant_weight(graph, node) and channel_bias(graph, node) is None:
        return (
            f"onnxruntime has no INT8 kernel for its bias `{node.input[2]}`, which is not a constant per output channel"
        )
    if pools := [pool for name in activations(graph, node) if (pool := _after_no_kernel(graph, name))]:
        return f"onnxruntime cannot load a quantizer behind `{pools[0]}`, an AveragePool with dilations"
    unknown = output not in known and node.op_type not in FLOAT_OUTPUT
    return f"no threshold is known for its output `{output}`" if unknown else ""


def _has_kernel(node: onnx.NodeProto) -> bool:
    """Return whether onnxruntime's INT8 kernel knows the attributes of a node."""
    if node.op_type == "Resize":
        return attribute(node, "mode", b"nearest") == b"nearest"
    return node.op_type != "AveragePool" or attribute(node, "dilations", None) is None


def _beside_convolution(graph: Graph, node: onnx.NodeProto) -> bool:
    """Return whether a MaxPool is next to a Conv, or before one; others pool channels first.

    On onnxruntime 1.32, UINT8 then takes 13 times as long as floating point.
    """
    producer = graph.producers.get(node.input[0])
    while producer is not None and producer.op_type in (*RECTIFIERS, "MaxPool"):
        producer = graph.producers.get(producer.input[0])
    pending = list(node.output)
    for name in pending:  # it grows meanwhile
        for reader in graph.consumers.get(name, []):
            if reader.op_type == "Conv":
                return True
            pending += [output for output in reader.output if output not in pending]
    return producer is not None and producer.op_type == "Conv"


def _after_no_kernel(graph: Graph, name: str) -> str:
    """Return which pool onnxruntime would join with a quantizer of this tensor, to a kernel that it does not have."""
    for _ in range(MAX_CHAIN):
        node = graph.producers.get(name)
        if node is None or node.op_type not in (*MOVING, *RECTIFIERS):
            return "" if node is None or _has_kernel(node) else node.name
        name = node.input[0]
    return ""


def _all_quantized(graph: Graph, plan: Plan, node: onnx.NodeProto) -> bool:
    """Return whether all activations that a node reads are quantized already, and its constants can be."""
    inputs = node.input if node.op_type in COMBINING else node.input[:1]
    if node.op_type in OPERATIONS and _has_operand(graph, node):
        inputs = activations(graph, node)
    return all(name in plan.readers for name in inputs)


def _is_scalar(graph: Graph, node: onnx.NodeProto) -> bool:
    return all(np.prod(graph.initializers[name].dims) == 1 for name in node.input if name in graph.initializers)


def _has_operand(graph: Graph, node: onnx.NodeProto) -> bool:
    """Return whether a node combines an activation and a constant that can be quantized."""
    constants = [graph.initializers[name] for name in node.input if name in graph.initializers]
    if len(constants) != 1 or constants[0].data_type != onnx.TensorProto.FLOAT:
        return False
    values = to_array(constants[0])
    return bool(values.size and np.isfinite(values).all() and values.any())
