"""What OpenVINO executes in int8: read from the kernels that it compiles a model to for this machine's CPU."""

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
from .verdicts import Fate, Verdict, follow_fused

_NUMBER = re.compile(r"#(\d+)#")
_LAYERS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
_ALL_INPUTS = ("Subgraph", "Eltwise", "Concatenation")
_AUXILIARY = ("Const", "Convert", "Input", "Output", "Reorder", "Reshape", "Transpose")
_EIGHT_BITS = ("i8", "u8")


class Kernel(NamedTuple):
    """One node of OpenVINO's runtime model."""

    layer_type: str
    primitive: str
    names: list[str]
    """Of what it was made of; the nodes of the ONNX model keep theirs, the last has that of the model's output."""
    types: list[str]
    """Of its inputs."""

    def operand_types(self) -> list[str]:
        """Return the types of what it computes with: data, and weights of a layer, but no scales, biases or axes."""
        if self.layer_type in _LAYERS:
            return self.types[:2]
        return self.types if self.layer_type in _ALL_INPUTS else self.types[:1]

    def fate(self) -> Fate:
        """Return what it does; it is int8 if all that it computes with is."""
        operands = self.operand_types()
        int8 = bool(operands) and all(one in _EIGHT_BITS for one in operands)
        return Fate(f"{self.layer_type}, {self.primitive}, on {' and '.join(operands)}", int8, len(self.names) > 1)


def verdicts(model: onnx.ModelProto, graph: Graph, nodes: Iterable[onnx.NodeProto]) -> dict[str, Verdict]:
    """Return how OpenVINO executes the nodes of a model, by their outputs."""
    with numbered(model) as path:
        fates = _fates(graph, compile_kernels(path))
    found, quantized = {}, behind_quantizers(graph)
    for node in nodes:
        fate = fates.get(node_key(node))
        if fate is not None and fate.int8 and quantized.isdisjoint(node.input):
            reason = f"executed as {fate.kernel}, but no quantizer lies before it: its integers are data"
            found[node_key(node)] = Verdict(False, reason)
        elif fate is None:
            found[node_key(node)] = follow_fused(graph, fates, node, "OpenVINO")
        else:
            found[node_key(node)] = Verdict(fate.int8, f"executed as {fate.kernel}{_bare(graph, node, fate)}")
    return found


def compile_kernels(path: Path) -> list[Kernel]:
    """Return the kernels of a model compiled for the CPU as by default.

    ``runtimePrecision``, which OpenVINO gives each, is not used: it is the narrowest type among the inputs, so that a
    sum of int8 and bfloat16 bears the name of int8.
    """
    return [_kernel(node) for node in compile_model(path).get_runtime_model().get_ordered_ops()]


def compile_model(path: Path) -> Any:
    """Return OpenVINO's compiled model for the CPU, on one thread."""
    openvino = _import_openvino()
    try:
        core = openvino.Core()
        return core.compile_model(core.read_model(path), "CPU", {"INFERENCE_NUM_THREADS": 1})
    except RuntimeError as error:
        raise ModelError(f"OpenVINO must be able to compile the model, got: {error}") from error


def _import_openvino() -> Any:
    """Import it silently: it forks a process to report its use over the network, but not where this variable is set."""
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


def _kernel(node: Any) -> Kernel:
    info = {name: str(node.rt_info[name].value) for name in ("layerType", "primitiveType", "originalLayersNames")}
    types = [one.get_element_type().get_type_name() for one in node.inputs()]
    return Kernel(info["layerType"], info["primitiveType"], info["originalLayersNames"].split(","), types)


def _fates(graph: Graph, kernels: list[Kernel]) -> dict[str, Fate]:
    """Return the fates of the model's nodes: of several kernels that bear a name, the layer, never one that only prepares."""
    by_use = sorted(kernels, key=lambda kernel: (kernel.layer_type in _LAYERS, kernel.layer_type not in _AUXILIARY))
    return {name: kernel.fate() for kernel in by_use for name in _made_of(graph, kernel)}


def _made_of(graph: Graph, kernel: Kernel) -> Iterator[str]:
    for name in kernel.names:
        number = _NUMBER.match(name)
        if number is not None:
            yield node_key(graph.nodes[int(number[1])])
        elif name in graph.producers:
            yield node_key(graph.producers[name])


def _bare(graph: Graph, node: onnx.NodeProto, fate: Fate) -> str:
    """Name what is not quantized of a layer in floating point."""
    bare = [name for name in node.input[:2] if dequantizer(graph, name) is None]
    explained = node.op_type in WEIGHTED and bare and not fate.int8
    return f"; its input `{bare[0]}` has no DequantizeLinear" if explained else ""
