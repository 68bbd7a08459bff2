"""Export a simulated model to an ONNX model that an engine runs in INT8."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.torch_version import TorchVersion

from klquant.errors import InvalidInputError, MissingDependencyError

from ...batches import first_batches
from ...settings import check_engine
from ...warning import warn
from ..model.arguments import arguments_of_call
from ..model.forward import Forward, call_model, check_eval
from ..model.functions import ADD
from ..model.layers import Tap, inner_layer
from ..model.products import Point
from ..simulation import quantized_layers
from ..stages import QuantizedModel, Source
from .trace import DynamicShapes, Traced, named_tensors, trace

if TYPE_CHECKING:
    from ...onnx.qdq_model import QDQModel
    from ...settings import Engine


KEPT_BATCHES = 8  # of the calibration's data, for tensors that the simulation does not round


def export_onnx(  # noqa: PLR0913 the options of an export
    model: nn.Module | QuantizedModel,
    example: Any,
    path: str | Path | None = None,
    *,
    engine: "Engine" = "tensorrt",
    batches: Iterable[Any] | None = None,
    forward: Forward | None = None,
    dynamic_batch: bool = True,
    dynamic_shapes: DynamicShapes | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> "QDQModel":
    """Export a simulated model to ONNX with QuantizeLinear and DequantizeLinear nodes.

    Parameters
    ----------
    model : QuantizedModel or torch.nn.Module
        The result of :func:`quantize`, its ``model``, or the result of :func:`simulate`; with 8 bits and in float32. It
        is not changed.
    example
        A batch to trace the model with, in any form that :func:`quantize` accepts.
    path : path, optional
        File to write the model to, atomically.
    engine : {"tensorrt", "openvino", "onnxruntime"}
        The engine that will run the model.
    batches : iterable, optional
        Calibration data, for tensors that the engine quantizes but the simulation does not round: inputs of sums and
        poolings, outputs of layers. By default the first 8 batches that a QuantizedModel was calibrated with. Without
        data such nodes stay in floating point. Sums for TensorRT need none after ``quantize(..., engine="tensorrt")``.
    forward : callable (model, batch) -> output
        How to run the model on `example` and `batches`; what the model itself is called with becomes the inputs. By
        default as in the calibration.
    dynamic_batch : bool
        Keep the batch size dynamic if the model allows it: dimension 0 of the first tensor, and of the tensors with as
        many samples.
    dynamic_shapes : mapping of input names to mappings of dimensions to names, optional
        Other dimensions that stay dynamic, such as ``{"input_ids": {1: "length"}, "attention_mask": {1: "length"}}``.
        Dimensions of one name have the same size.
    input_names, output_names : sequence of str, optional
        By default the names of the arguments, and the names that torch chooses.

    Returns
    -------
    QDQModel
        The ONNX `model`, the `thresholds` by tensor name, and why layers were `skipped`.

    Raises
    ------
    InvalidInputError
        If the model is not simulated, in training mode, or not in 8 bits and float32; if two layers round one tensor
        differently and the engine cannot; if a layer rounds what a branch reads. The message names the layers.
    ModelError
        If torch cannot export the model. Its error is the cause.
    MissingDependencyError
        Without onnx, onnxruntime or onnxscript, or with torch before 2.9.

    Warns
    -----
    CalibrationWarning
        For nodes that stay in floating point, and for sizes that stay fixed despite `dynamic_batch` and
        `dynamic_shapes`.

    Notes
    -----
    For "tensorrt" and "openvino" without data, the model rounds exactly where the simulation does. Activations
    saturate at -128; :func:`saturate_like_engines` changes the simulation to do the same. Codes may differ where a sum
    in another order moves a value across the edge between two levels.

    With data, and for "onnxruntime", quantizers follow the rules of the engine, see
    :func:`klquant.backends.onnx.quantize`. Thresholds of the simulation take precedence over new ones.
    """
    source = model.source if isinstance(model, QuantizedModel) else Source()
    network: nn.Module = model.model if isinstance(model, QuantizedModel) else model
    _check(network)
    _need_onnx()
    from .qdq import place

    check_engine(engine)
    forward, shapes = forward or source.forward, dynamic_shapes or {}
    traced = trace(
        network,
        arguments_of_call(network, example, forward),
        dynamic_batch=dynamic_batch,
        dynamic_shapes=shapes,
        input_names=input_names,
        output_names=output_names,
    )
    if batches is None:
        data = () if source.batches is None else first_batches(source.batches, KEPT_BATCHES)
        kept = _Arrays(network, data, traced.inputs, forward)
        fitting = [arrays for arrays in kept if _fits(arrays, traced)]
        result = place(traced, engine, fitting, may_ignore=True, has_sums=_has_sums(model))
    else:
        arrays = _Arrays(network, batches, traced.inputs, forward)
        result = place(traced, engine, arrays, has_sums=_has_sums(model))
    _warn_of_fixed_sizes(result, dynamic_batch, shapes)
    if path is not None:
        result.save(path)
    return result


def _has_sums(model: nn.Module | QuantizedModel) -> bool:
    """Return whether residual sums were looked for, and found: those that are not rounded were excluded."""
    if isinstance(model, QuantizedModel):
        return any(row["function"] == ADD for row in model.calibration.transforms.get("products", ()))
    return any(isinstance(module, Point) and module.function == ADD for module in model.modules())


class _Arrays:
    """Batches as arrays by ONNX input name, which can be iterated more than once."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        inputs: Mapping[str, str],
        forward: Forward = call_model,
    ) -> None:
        if isinstance(batches, Iterator):
            raise InvalidInputError(
                f"`batches` must be iterable more than once, got the one-shot "
                f"{type(batches).__name__}; pass a list or a DataLoader"
            )
        self._model, self._batches, self._inputs, self._forward = model, batches, inputs, forward

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._batches:
            tensors = named_tensors(self._model, arguments_of_call(self._model, batch, self._forward)).items()
            yield {self._inputs.get(name, name): tensor.numpy(force=True) for name, tensor in tensors}


def _fits(arrays: Mapping[str, Any], traced: Traced) -> bool:
    """Return whether the sizes of a batch are those that are fixed in the traced model."""
    shapes = {str(value.name): value.shape or () for value in traced.model.graph.inputs}
    sizes = (
        (size, got) for name, array in arrays.items() for size, got in zip(shapes[name], array.shape, strict=False)
    )
    return all(size == got for size, got in sizes if isinstance(size, int))


def _warn_of_fixed_sizes(result: "QDQModel", dynamic_batch: bool, given: DynamicShapes) -> None:
    """Warn if torch fixed sizes that were to stay dynamic."""
    shapes = {value.name: value.type.tensor_type.shape.dim for value in result.model.graph.input}
    because = "to that of the example, because the model computes with it"
    if dynamic_batch and any(shapes.values()) and not any(shape[0].dim_param for shape in shapes.values() if shape):
        warn(f"the batch size is fixed {because}, perhaps by len(x)")
    for name, axes in given.items():
        for axis, size in axes.items():
            if not shapes[name][axis].dim_param:
                warn(f"`{size}`, dimension {axis} of input `{name}`, is fixed {because}")


def _need_onnx() -> None:
    if TorchVersion(torch.__version__) < "2.9":  # 2.8 silently exports only one branch of a data-dependent if
        raise MissingDependencyError(f"export_onnx needs torch 2.9 or later, got {torch.__version__}")
    try:
        import onnxscript  # noqa: F401 (torch's exporter needs it)

        from ... import onnx  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "export_onnx needs onnx, onnxruntime and onnxscript: pip install 'klquant[onnx]'"
        ) from error


def _check(model: nn.Module) -> None:
    check_eval(model)
    for name, layer in quantized_layers(model).items():
        dtype = torch.float32 if isinstance(layer.layer, Tap) else inner_layer(layer.layer).weight.dtype
        if layer.num_bits != 8:
            raise InvalidInputError(f"layer `{name}` must have 8 bits to be exported, got {layer.num_bits}")
        if dtype != torch.float32:
            raise InvalidInputError(f"layer `{name}` must be in float32 to be exported, got {dtype}; use model.float()")
