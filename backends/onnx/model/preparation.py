"""Prepare a model for calibration: check it, fold constants and BatchNorms, and give every node a name.

The steps hand files to each other, with the weights beside the graph: protobuf cannot hold more than 2 GB.
"""

from pathlib import Path
from typing import NamedTuple

import onnx
import onnxruntime
from onnx.external_data_helper import uses_external_data

from klquant.errors import InvalidInputError

from ...files import temporary_folder
from .constants import fold_constants
from .graph import Graph, copied, read_graph
from .loading import check_graph, read_model, wanted
from .normal_form import model_nodes, sort_values, tidy
from .optimization import optimize
from .repairs import drop_default_dilations, free_sizes, free_weights, make_dense, name_apart, rank_outputs, split_sums
from .saving import write_model
from .types import infer_types

MIN_OPSET = 13  # the first with scales per channel
_RENAMING = ("ConstantSharing", "TransposeOptimizer", "GeluFusionL1", "LayerNormFusionL1")  # or replacing operators


class Prepared(NamedTuple):
    """A model that is ready to be calibrated and quantized, from :func:`prepare`."""

    model: onnx.ModelProto
    graph: Graph
    """The nodes and tensors of `model`, by name."""

    def __repr__(self) -> str:
        """Return the number of nodes, and the inputs and outputs."""
        ends = f"{', '.join(self.graph.inputs)} -> {', '.join(self.graph.outputs)}"
        return f"Prepared({len(self.graph.nodes)} nodes, {ends})"


def prepare(model: onnx.ModelProto | str | Path | Prepared) -> Prepared:
    """Prepare a model for :func:`calibrate` and :func:`quantize`.

    onnxruntime's basic optimization turns constants into initializers, removes identities and dropouts, folds
    BatchNorm into the layer before it, and joins a product and its bias in a Gemm. Local functions are inlined.
    Inputs, outputs and the remaining tensors keep their names, every node gets a unique name, and shapes and types are
    inferred where possible.

    Parameters
    ----------
    model : onnx.ModelProto, path or Prepared
        A float model. A model given by path may have its weights in files beside it. It is not changed. A prepared
        model is returned as it is.

    Returns
    -------
    Prepared
        The prepared `model`, of opset 13 or newer, and its `graph`. Equal models give equal bytes.

    Raises
    ------
    InvalidInputError
        If the model is not valid or already quantized, if its opset cannot be raised to 13, or if onnxruntime does not
        know an operator. The message names the file. A missing file raises FileNotFoundError.

    Notes
    -----
    A model that casts activations between float16 and wider types is not optimized: onnxruntime on CPUs computes
    float16 in float32, and its casts look like the model's. It has few kernels for bfloat16 on CPUs.
    """
    if isinstance(model, Prepared):
        return model
    name = f"`{model}`" if isinstance(model, str | Path) else "`model`"
    with wanted(f"{name} must be a valid ONNX model"):
        given = _read(model)
    _refuse_quantized(name, given)
    with wanted(f"{name} must be a valid ONNX model"):
        make_dense(given)
        free_sizes(given)
        rank_outputs(given)
    free_weights(given)
    with temporary_folder() as folder:
        with wanted(f"{name} must have opset {MIN_OPSET}, or one that onnx can raise to it"):
            given = _raise_opset(given)
            drop_default_dilations(given)
        with wanted(f"{name} must be a valid ONNX model"):
            if casts_halves(given):
                fold_constants(given)
            name_apart(given)
            path = write_model(given, folder / "given.onnx")
            _check(given, path)
        with wanted(f"{name} must be a model that onnxruntime can run"):
            optimized = given if casts_halves(given) else split_sums(_optimized(path), given)
        tidy(optimized, like=given)
        with wanted(f"{name} must have consistent shapes and types"):
            prepared = infer_types(optimized, folder)
            sort_values(prepared.graph)
        onnx.load_external_data_for_model(prepared, str(folder))
    for tensor in prepared.graph.initializer:
        tensor.ClearField("data_location")  # it may be set or not for the same model
    return Prepared(prepared, read_graph(prepared))


def _read(model: onnx.ModelProto | str | Path) -> onnx.ModelProto:
    """Return a copy with all its weights."""
    if isinstance(model, str | Path):
        return read_model(model)
    if not isinstance(model, onnx.ModelProto):
        raise InvalidInputError(f"`model` must be an onnx.ModelProto or a path, got {type(model).__name__}")
    for tensor in model.graph.initializer:
        if uses_external_data(tensor):
            raise InvalidInputError(f"weights must be loaded, got `{tensor.name}` in another file; pass the path")
    check_graph(model)
    return copied(model)


def _refuse_quantized(name: str, model: onnx.ModelProto) -> None:
    for node in model_nodes(model):
        kind = node.op_type
        if kind.endswith(("QuantizeLinear", "DequantizeLinear", "Integer")) or kind.startswith("QLinear"):
            raise InvalidInputError(f"{name} must be a float model, got {kind} in node `{node.name}`")


def _check(model: onnx.ModelProto, path: Path) -> None:
    """Run onnx's checker; it demands the rank of outputs, which operators of other domains may leave open."""
    kinds = [value.type for value in model.graph.output]
    if all(kind.tensor_type.HasField("shape") for kind in kinds if kind.HasField("tensor_type")):
        onnx.checker.check_model(str(path))
        return
    ranked = copied(model)
    for value in ranked.graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.shape.SetInParent()
    onnx.checker.check_model(str(write_model(ranked, path.with_name("ranked.onnx"))))


def _raise_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), MIN_OPSET)
    if opset >= MIN_OPSET:
        return model
    onnx.checker.check_model(model)  # an invalid model may crash the converter
    return onnx.version_converter.convert_version(model, MIN_OPSET)


def _optimized(path: Path) -> onnx.ModelProto:
    """Return what onnxruntime's basic optimization makes of a model."""
    level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return without_inserted_casts(optimize(path, level, disabled=_RENAMING))


_INSERTED = "InsertedPrecisionFreeCast_"  # prefix of the casts that onnxruntime inserts, and of their outputs
_HALF = onnx.TensorProto.FLOAT16


def casts_halves(model: onnx.ModelProto) -> bool:
    """Return whether a float16 model has casts, which look like those that onnxruntime inserts."""
    graph = model.graph
    types = {tensor.data_type for tensor in graph.initializer}
    types |= {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    targets = {a.i for node in graph.node if node.op_type == "Cast" for a in node.attribute if a.name == "to"}
    return _HALF in types | targets and bool(targets)


def without_inserted_casts(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove the casts that onnxruntime inserted, and give the tensors their old names."""
    graph = model.graph
    for node in [node for node in graph.node if node.op_type == "Cast" and node.name.startswith(_INSERTED)]:
        graph.node.remove(node)
    for value in [value for value in graph.value_info if value.name.startswith(_INSERTED)]:
        graph.value_info.remove(value)
    for node in graph.node:
        node.input[:] = [name.removeprefix(_INSERTED) for name in node.input]
        node.output[:] = [name.removeprefix(_INSERTED) for name in node.output]
    return model
