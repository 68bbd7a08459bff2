"""The rest of a quantized model in float16: TensorRT runs a strongly typed network in the types that it has."""

from collections.abc import Collection, Mapping

import onnx
from onnx import version_converter
from onnxruntime.transformers.float16 import convert_float_to_float16

from klquant.errors import InvalidInputError

from ...calibration import Calibration
from ..engines.quantizer_nodes import DEQUANTIZE, QUANTIZE
from ..model.graph import Graph, copied, read_graph
from ..model.loading import wanted
from ..model.normal_form import tidy
from ..model.operators import RECTIFIERS
from ..model.preparation import Prepared

OPSET = 19  # the first with scales in float16
TO_HALF = "_cast_to_fp16"  # ends the name of a result in float32 that the converter casts to float16
LARGEST = 65504.0  # of float16


def with_float16_scales(prepared: Prepared) -> Prepared:
    """Return the model with an opset whose quantizers can have scales in float16; all names stay."""
    opset = next(entry.version for entry in prepared.model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset >= OPSET:
        return prepared
    with wanted(f"`float16` needs opset {OPSET}, or a model that onnx can raise to it"):
        raised = version_converter.convert_version(prepared.model, OPSET)
    before = {node.name for node in prepared.graph.nodes}
    if lost := before - {node.name for node in raised.graph.node}:
        raise InvalidInputError(f"`float16` needs opset {OPSET}, and onnx replaces node `{min(lost)}` on the way to it")
    inferred = onnx.shape_inference.infer_shapes(raised)
    return Prepared(inferred, read_graph(inferred))


def too_large(graph: Graph, calibration: Calibration | Mapping[str, float]) -> set[str]:
    """Return the names of nodes of a quantized model that read or compute values beyond float16."""
    amax = calibration.amax if isinstance(calibration, Calibration) else calibration
    names = {name for name, value in amax.items() if value > LARGEST}
    for node in reversed(graph.nodes):  # tensors before a rectifier are not observed
        if node.op_type in RECTIFIERS and node.output[0] in names:
            names.add(node.input[0])
    for node in graph.nodes:
        if node.op_type in (QUANTIZE, DEQUANTIZE) and node.input[0] in names:
            names.add(node.output[0])
    return {node.name for node in graph.nodes if not names.isdisjoint((*node.input, *node.output))}


def to_float16(model: onnx.ModelProto, kept: Collection[str]) -> onnx.ModelProto:
    """Return a model that computes in float16, except for these nodes. Inputs and outputs keep their types."""
    result = convert_float_to_float16(copied(model), keep_io_types=True, node_block_list=sorted(kept))
    _remove_detours(result.graph)
    tidy(result, like=model)
    del result.graph.value_info[:]  # the converter leaves the types of some
    inferred: onnx.ModelProto = onnx.shape_inference.infer_shapes(result)
    onnx.checker.check_model(inferred)
    return inferred


def _remove_detours(graph: onnx.GraphProto) -> None:
    """Let nodes in float32 read each other directly: the converter puts float16 between them, which is too small."""
    casts = {node.output[0]: node for node in graph.node if node.op_type == "Cast"}
    sources = {name: node.input[0] for name, node in casts.items() if node.input[0].endswith(TO_HALF)}
    wide = {name: sources[node.input[0]] for name, node in casts.items() if node.input[0] in sources}
    for node in graph.node:
        node.input[:] = [wide.get(name, name) for name in node.input]
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for name in (wide.keys() | sources.keys()) - used:
        graph.node.remove(casts[name])
