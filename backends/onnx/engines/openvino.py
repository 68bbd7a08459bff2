"""What OpenVINO runs in int8, read from the kernels that it compiles for this machine's CPU."""

import functools
import importlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import onnx

from klquant.errors import MissingDependencyError, ModelError

from ...settings import WEIGHTED
from ..model.graph import Graph, node_key
from .inspected_model import numbered
from .quantizer_nodes import behind_quantizers, dequantizer
from .verdicts import Kernel, Verdict, follow_fused

_NUMBER = re.compile(r"#(\d+)#")
_LAYERS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
_ALL_INPUTS = ("Subgraph", "Eltwise", "Concatenation")
_AUXILIARY = ("Const", "Convert", "Input", "Output", "Reorder", "Reshape", "Transpose")
_ORIGINAL = "_original"  # a layer before an output of the model, if the dequantizing node behind it takes its name
_EIGHT_BITS = ("i8", "u8")


class RuntimeNode(NamedTuple):
    """One node of OpenVINO's runtime model."""

    layer_type: str
    primitive: str
    names: list[str]
    """Names of the nodes that it was made from; the last node has the name of the model's output."""
    types: list[str]
    """Types of its inputs."""

    def operand_types(self) -> list[str]:
        """Return the types of its data and, for a layer, its weights; not of scales, biases and axes."""
        if self.layer_type in _LAYERS:
            return self.types[:2]
        return self.types if self.layer_type in _ALL_INPUTS else self.types[:1]

    def kernel(self) -> Kernel:
        """Return how it runs; it is int8 if all its operands are."""
        operands = self.operand_types()
        int8 = bool(operands) and all(one in _EIGHT_BITS for one in operands)
        return Kernel(f"{self.layer_type}, {self.primitive}, on {' and '.join(operands)}", int8, len(self.names) > 1)


def verdicts(model: onnx.ModelProto, graph: Graph, nodes: Iterable[onnx.NodeProto]) -> dict[str, Verdict]:
    """Return how OpenVINO runs the nodes of a model, by node key."""
    with numbered(model) as path:
        kernels = _kernels(graph, runtime_nodes(path))
    found, quantized = {}, behind_quantizers(graph)
    for node in nodes:
        kernel = kernels.get(node_key(node))
        if kernel is not None and kernel.int8 and quantized.isdisjoint(node.input):
            reason = f"executed as {kernel.name}, but no quantizer precedes it"
            found[node_key(node)] = Verdict(False, reason)
        elif kernel is None:
            found[node_key(node)] = follow_fused(graph, kernels, node, "OpenVINO")
        else:
            found[node_key(node)] = Verdict(
                kernel.int8, f"executed as {kernel.name}{_float_input(graph, node, kernel)}"
            )
    return found


def runtime_nodes(path: Path) -> list[RuntimeNode]:
    """Return the kernels of a model, compiled for the CPU with default options.

    OpenVINO's ``runtimePrecision`` is ignored: it is the narrowest type among the inputs, so a sum of int8 and bfloat16
    would count as int8.
    """
    return [_runtime_node(node) for node in compile_model(path).get_runtime_model().get_ordered_ops()]


def compile_model(path: Path, **options: str) -> Any:
    """Return OpenVINO's compiled model for the CPU, on one thread."""
    core = _core()
    try:
        return core.compile_model(core.read_model(path), "CPU", {"INFERENCE_NUM_THREADS": 1, **options})
    except RuntimeError as error:
        raise ModelError(f"OpenVINO must be able to compile the model, got: {error}") from error


@functools.cache
def _core() -> Any:
    """Return the only Core of the process: after two with a compiled model each, Ctrl-C crashes OpenVINO 2026.4."""
    return _import_openvino().Core()


def _import_openvino() -> Any:
    """Import openvino without telemetry: it forks a process to report its use, unless this variable is set."""
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise MissingDependencyError("inspecting for OpenVINO needs openvino: pip install openvino") from error
    finally:
        if before is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = before


def _runtime_node(node: Any) -> RuntimeNode:
    info = {name: str(node.rt_info[name].value) for name in ("layerType", "primitiveType", "originalLayersNames")}
    types = [one.get_element_type().get_type_name() for one in node.inputs()]
    return RuntimeNode(info["layerType"], info["primitiveType"], info["originalLayersNames"].split(","), types)


def _kernels(graph: Graph, nodes: list[RuntimeNode]) -> dict[str, Kernel]:
    """Return how the nodes of the model run; if several kernels bear a name, the layer counts, then the others."""
    by_use = sorted(nodes, key=lambda node: (node.layer_type in _LAYERS, node.layer_type not in _AUXILIARY))
    return {name: node.kernel() for node in by_use for name in _keys_of(graph, node)}


def _keys_of(graph: Graph, made: RuntimeNode) -> Iterator[str]:
    for name in made.names:
        number = _NUMBER.match(name)
        if number is not None:
            yield node_key(graph.nodes[int(number[1])])
        elif (output := name.removesuffix(_ORIGINAL)) in graph.producers:
            yield node_key(graph.producers[output])


def _float_input(graph: Graph, node: onnx.NodeProto, kernel: Kernel) -> str:
    """Name the input of a layer in floating point that is not quantized."""
    floats = [name for name in node.input[:2] if dequantizer(graph, name) is None]
    explained = node.op_type in WEIGHTED and floats and not kernel.int8
    return f"; its input `{floats[0]}` has no DequantizeLinear" if explained else ""
