"""A model that runs a float model beside its quantized form and holds the means of the second to those of the first.

Behind each layer of the quantized part it adds to every channel the mean of what quantization took from it. So all
later layers see inputs that are corrected already, and one run does what otherwise takes a run for each layer. The sums
of the differences go in and come out: from batch to batch the means are over all data so far.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..model.graph import copied, node_key
from ..model.normal_form import with_inner
from ..model.preparation import Prepared
from .biases import Bias

SUM, COUNT = "/sum", "/count"
"""Ends of the names of inputs: of the differences of each channel, and of how many were added up."""
NEW = "/new"
"""End of the names of the outputs that take their place."""


def join(
    prepared: Prepared, quantized: onnx.ModelProto, biases: Iterable[Bias], *, inputs: bool
) -> tuple[onnx.ModelProto, list[str]]:
    """Return the joined model, and for each bias the name that its inputs and outputs start with.

    With `inputs` the whole float model runs beside the quantized one, so the means take in what quantization does to
    the inputs of a layer. Without, each layer is compared with its float form on the same quantized inputs.
    """
    model = copied(quantized)
    prefix = _unused_prefix([*model.graph.node, *prepared.graph.nodes])
    originals = _renamed(prepared, prefix)
    names = {bias.node: f"{prefix}{k}" for k, bias in enumerate(biases)}
    nodes = list(originals.values()) if inputs else []
    layers = {node.name: node for node in model.graph.node}
    by_node = {bias.node: bias for bias in biases}
    for node in model.graph.node:
        nodes.append(node)
        if bias := by_node.get(node.name):
            if not inputs:
                originals[bias.layer].input[0] = layers[bias.layer].input[0]
                nodes += [originals[name] for name in dict.fromkeys((bias.layer, bias.node))]
            nodes += _corrected(node, originals[node.name].output[0], bias, names[node.name])
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:], model.graph.output[:], model.graph.value_info[:]
    model.graph.node.extend(kept)
    ours = {tensor.name for tensor in model.graph.initializer}
    model.graph.initializer.extend(t for t in prepared.model.graph.initializer if t.name not in ours)
    for bias in biases:
        _add_state(model.graph, names[bias.node], len(bias.values), bias.spatial)
    return model, [names[bias.node] for bias in biases]


def _unused_prefix(nodes: Iterable[onnx.NodeProto]) -> str:
    prefix = "float/"
    texts = [text for node in nodes for inner in with_inner(node) for text in (*inner.output, inner.name)]
    while any(text.startswith(prefix) for text in texts):
        prefix = f"_{prefix}"
    return prefix


def _renamed(prepared: Prepared, prefix: str) -> dict[str, onnx.NodeProto]:
    """Return the nodes of the float model by name, with other names of their outputs; constants keep theirs."""
    nodes = list(copied(prepared.model).graph.node)
    produced = set(filter(None, prepared.graph.producers))
    by_name = {node.name: node for node in nodes}
    for node in nodes:
        node.name = prefix + node.name
        for inner in with_inner(node):
            inner.input[:] = [prefix + name if name in produced else name for name in inner.input]
        node.output[:] = [prefix + name if name else "" for name in node.output]
    return by_name


def _corrected(node: onnx.NodeProto, exact: str, bias: Bias, name: str) -> Iterator[onnx.NodeProto]:
    """Yield the nodes that add to the output of a node what makes its means those of the exact output."""
    result, raw = node_key(node), f"{name}/raw"
    node.output[0] = raw

    def step(kind: str, output: str, *inputs: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(kind, list(inputs), [output], f"{output}/{kind}", **attributes)

    wide = [exact, raw]
    half = bias.values.dtype == np.float16
    if half:
        wide = [f"{name}/exact_wide", f"{name}/raw_wide"]
        yield step("Cast", wide[0], exact, to=TensorProto.FLOAT)
        yield step("Cast", wide[1], raw, to=TensorProto.FLOAT)
    yield step("Sub", f"{name}/difference", *wide)
    yield step("Reshape", f"{name}/rows", f"{name}/difference", f"{name}/shape_of_rows")
    yield step("ReduceSum", f"{name}/batch_sum", f"{name}/rows", f"{name}/axes", keepdims=0)
    yield step("Add", f"{name}{SUM}{NEW}", f"{name}{SUM}", f"{name}/batch_sum")
    yield step("Size", f"{name}/size", f"{name}/difference")
    yield step("Cast", f"{name}/float_size", f"{name}/size", to=TensorProto.FLOAT)
    yield step("Div", f"{name}/batch_count", f"{name}/float_size", f"{name}/channels")
    yield step("Add", f"{name}{COUNT}{NEW}", f"{name}{COUNT}", f"{name}/batch_count")
    yield step("Div", f"{name}/mean", f"{name}{SUM}{NEW}", f"{name}{COUNT}{NEW}")
    yield step("Reshape", f"{name}/shaped", f"{name}/mean", f"{name}/shape_of_mean")
    shift = f"{name}/shaped"
    if half:
        yield step("Cast", f"{name}/shift", shift, to=TensorProto.FLOAT16)
        shift = f"{name}/shift"
    yield step("Add", result, raw, shift)


def _add_state(graph: onnx.GraphProto, name: str, channels: int, spatial: int) -> None:
    """Add the inputs, outputs and constants of one correction."""
    for end, shape in ((SUM, [channels]), (COUNT, [])):
        graph.input.append(helper.make_tensor_value_info(name + end, TensorProto.FLOAT, shape))
        graph.output.append(helper.make_tensor_value_info(name + end + NEW, TensorProto.FLOAT, shape))
    rows = [0, channels, -1] if spatial else [-1, channels]
    constants = {
        "shape_of_rows": np.array(rows, np.int64),
        "axes": np.array([0, 2] if spatial else [0], np.int64),
        "channels": np.float32(channels),
        "shape_of_mean": np.array([channels] + [1] * spatial, np.int64),
    }
    graph.initializer.extend(numpy_helper.from_array(np.asarray(v), f"{name}/{k}") for k, v in constants.items())
