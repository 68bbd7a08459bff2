"""What onnxruntime runs in int8, read from its optimized graph for this machine's CPU."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx
import onnxruntime

from klquant.errors import ModelError

from ..model.graph import Graph, node_key, read_graph
from ..model.optimization import optimize
from .inspected_model import numbered
from .onnxruntime_reasons import LAYERS, Case, why_float, why_wrong
from .quantizer_nodes import DEQUANTIZE, INT8, QUANTIZE, UINT8, parameters
from .verdicts import Kernel, Verdict, follow_fused

_NUMBER = re.compile(r"#(\d+)#")
_NCHWC = "_nchwc"
_FLOAT_OUTPUT = ("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "ConvInteger", "MatMulInteger", DEQUANTIZE)
_QGEMM_OUTPUT_SCALE = 7  # input of QGemm that is present only if it quantizes its output


def verdicts(model: onnx.ModelProto, graph: Graph, nodes: Iterable[onnx.NodeProto]) -> dict[str, Verdict]:
    """Return how onnxruntime runs the nodes of a model, by node key."""
    with numbered(model) as path:
        optimized = _optimized(path)
    executed = _executed(graph, optimized)
    eight_bits = _eight_bits(optimized)
    kernels = {
        name: Kernel(node.op_type, not eight_bits.isdisjoint(node.input), _kind(node) != _kind(graph.producers[name]))
        for name, node in executed.items()
    }
    return {node_key(node): _verdict(graph, optimized, executed.get(node_key(node)), kernels, node) for node in nodes}


def _verdict(
    graph: Graph,
    optimized: Graph,
    executed: onnx.NodeProto | None,
    kernels: Mapping[str, Kernel],
    node: onnx.NodeProto,
) -> Verdict:
    if executed is not None and kernels[node_key(node)].int8:
        wrong = why_wrong(graph, node)
        return Verdict(True, f"executed as {executed.op_type}" + (f" with wrong results: {wrong}" if wrong else ""))
    if executed is None:
        verdict = follow_fused(graph, kernels, node, "onnxruntime")
        if verdict.int8 or node.op_type not in LAYERS:
            return verdict
    return Verdict(False, why_float(Case(graph, node, optimized, executed)))


def _optimized(path: Path) -> Graph:
    """Return the graph that onnxruntime runs by default, with all optimizations."""
    try:
        return read_graph(optimize(path, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL))
    except Exception as error:  # onnxruntime's exceptions have no other common base
        raise ModelError(f"onnxruntime must be able to load the model, got: {error}") from error


def _executed(graph: Graph, optimized: Graph) -> dict[str, onnx.NodeProto]:
    """Return the nodes that onnxruntime runs, by the key of the node that each was made from.

    Their names contain the number of that node or, in the NCHWc layout, its output. A node inserted before it, such as
    a dequantizer for its bias, may contain the number too; the last node counts.
    """
    found: dict[str, onnx.NodeProto] = {}
    for node in optimized.nodes:
        originals = [graph.nodes[int(number)] for number in _NUMBER.findall(node.name)]
        if node.name.endswith(_NCHWC) and node.name.removesuffix(_NCHWC) in graph.producers:
            originals.append(graph.producers[node.name.removesuffix(_NCHWC)])
        found |= {node_key(original): node for original in originals}
    return found


def _kind(node: onnx.NodeProto) -> tuple[str, str]:
    return node.domain, node.op_type


def _eight_bits(optimized: Graph) -> set[str]:
    """Return the 8-bit activations: outputs of quantizers, 8-bit inputs, and what kernels compute from those."""
    found = {name for name in optimized.inputs if optimized.types.get(name) in (INT8, UINT8)}
    for node in optimized.nodes:
        if node.op_type == QUANTIZE:
            is_8_bit = parameters(optimized, node).dtype in (INT8, UINT8)
        elif node.op_type == "QGemm":
            is_8_bit = len(node.input) > _QGEMM_OUTPUT_SCALE
        else:
            is_8_bit = node.op_type not in _FLOAT_OUTPUT and not found.isdisjoint(node.input)
        if is_8_bit:
            found.update(node.output)
    return found
