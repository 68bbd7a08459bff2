"""Run quantized models: in onnxruntime with or without optimization, in OpenVINO, and cut at their quantizers."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from klquant.errors import ModelError

from ..files import temporary_folder
from .engines.openvino import compile_model
from .engines.quantizer_nodes import QUANTIZE, depends_on_input, parameters
from .feeds import Array
from .model.graph import FLOATS, Graph, copied
from .model.saving import write_model

Feed: TypeAlias = Mapping[str, Array]
Session: TypeAlias = Callable[[Sequence[str], Feed], dict[str, Array]]
"""From names of tensors and the inputs to the tensors; inputs that the model lacks are ignored."""
_GIVEN = "/given by the engine"
FEEDBACK = ("Loop", "Scan", "GRU", "LSTM", "RNN")
"""Operators that read their own results, and so amplify rounding."""
CHOOSING = (
    "ArgMax",
    "ArgMin",
    "TopK",
    "NonMaxSuppression",
    "Less",
    "LessOrEqual",
    "Greater",
    "GreaterOrEqual",
    "Equal",
)
"""Operators that choose between values; which of two nearly equal ones is left to rounding."""


@contextmanager
def open_onnxruntime(model: onnx.ModelProto, *, optimized: bool, threads: int = 0) -> Iterator[Session]:
    """Yield a model as onnxruntime runs it by default, or node by node as it is written; 0 threads are the default."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.log_severity_level = 4  # errors are raised
    how = "optimized" if optimized else "without optimization"
    with temporary_folder() as folder:
        path = write_model(copied(model), folder / "model.onnx")
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a dozen, with no common base
            raise ModelError(f"onnxruntime, {how}, cannot load the model: {error}") from error
        inputs = {one.name for one in session.get_inputs()}

        def run(names: Sequence[str], feed: Feed) -> dict[str, Array]:
            try:
                outputs = session.run(list(names), {name: feed[name] for name in feed if name in inputs})
            except Exception as error:
                raise ModelError(f"onnxruntime, {how}, cannot run the model: {error}") from error
            return {name: _flat(value) for name, value in zip(names, outputs, strict=True)}

        yield run


def _flat(value: Any) -> Array:
    """Return an output as one array: of a sequence or a map all numbers."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        parts = [_flat(one).ravel() for one in value]
        return np.concatenate(parts) if parts else np.zeros(0)
    return np.asarray(value)


@contextmanager
def open_openvino(model: onnx.ModelProto) -> Iterator[Session]:
    """Yield a model as OpenVINO runs it on this machine's CPU, in float32 outside of INT8; it returns outputs only."""
    with temporary_folder() as folder:
        compiled = compile_model(write_model(copied(model), folder / "model.onnx"), INFERENCE_PRECISION_HINT="f32")
        order = [output.name for output in model.graph.output]
        read = {name for port in compiled.inputs for name in port.get_names()}  # older versions drop unused inputs

        def run(names: Sequence[str], feed: Feed) -> dict[str, Array]:
            try:
                found = compiled({name: array for name, array in feed.items() if name in read})
            except RuntimeError as error:
                raise ModelError(f"OpenVINO cannot run the model: {error}") from error
            outputs = {name: found[k] for k, name in enumerate(order)}
            return {name: outputs[name] for name in names}

        yield run


def quantized_tensors(graph: Graph) -> list[str]:
    """Return the integers that quantizers make of activations, by name and in the order of the graph."""
    live = depends_on_input(graph)
    return [node.output[0] for node in graph.nodes if node.op_type == QUANTIZE and node.input[0] in live]


def unsteady_tensors(graph: Graph, quantized: Sequence[str]) -> set[str]:
    """Return what float32 rounding alone can change by any amount, between the quantized tensors."""
    found: set[str] = set()
    for node in graph.nodes:
        chosen = node.op_type in CHOOSING and graph.types.get(node.input[0], FLOATS[0]) in FLOATS
        if chosen or node.op_type in FEEDBACK or not found.isdisjoint({*node.input}.difference(quantized)):
            found.update(node.output)
    return found


def with_outputs(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """Return a copy of which these tensors are outputs too."""
    known = {value.name for value in model.graph.output}
    result = copied(model)
    result.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    return result


def cut_at(model: onnx.ModelProto, graph: Graph, quantized: Sequence[str]) -> onnx.ModelProto:
    """Return a copy in which what reads these integers reads new inputs of the graph instead, and they are outputs."""
    result = with_outputs(model, quantized)
    for node in result.graph.node:
        node.input[:] = [given(name) if name in quantized else name for name in node.input]
    for name in quantized:
        dtype = parameters(graph, graph.producers[name]).dtype
        result.graph.input.append(helper.make_tensor_value_info(given(name), dtype, None))
    return result


def given(name: str) -> str:
    """Return the input of a cut model that stands for a tensor."""
    return f"{name}{_GIVEN}"
