"""Export a simulated model to an ONNX model that an engine runs in INT8."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.torch_version import TorchVersion

from klquant.errors import InvalidInputError, MissingDependencyError

from ...settings import check_engine
from ...warning import warn
from ..model.forward import check_eval
from ..model.layers import Tap, inner_layer
from ..simulation import quantized_layers
from .trace import named_tensors, trace

if TYPE_CHECKING:
    from ...onnx.qdq_model import QDQModel
    from ...settings import Engine


def export_onnx(
    model: nn.Module,
    example: Any,
    path: str | Path | None = None,
    *,
    engine: "Engine" = "tensorrt",
    batches: Iterable[Any] | None = None,
    dynamic_batch: bool = True,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> "QDQModel":
    """Export a simulated model to ONNX with QuantizeLinear and DequantizeLinear nodes.

    Parameters
    ----------
    model : torch.nn.Module
        ``result.model`` of :func:`quantize`, or the result of :func:`simulate`, with 8 bits and in float32. It is not
        changed.
    example
        A batch to trace the model with, in any form that :func:`quantize` accepts.
    path : path, optional
        File to write the model to, atomically.
    engine : {"tensorrt", "openvino", "onnxruntime"}
        The engine that will run the model.
    batches : iterable, optional
        Calibration data, for tensors that the engine quantizes but the simulation does not round: inputs of sums and
        poolings, outputs of layers. Without it, such nodes stay in floating point.
    dynamic_batch : bool
        Keep the batch size dynamic if the model allows it: dimension 0 of the first tensor, and of the tensors with as
        many samples.
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
        For nodes that stay in floating point, and for a batch size that stays fixed despite `dynamic_batch`.

    Notes
    -----
    For "tensorrt" and "openvino" without `batches`, the model rounds exactly where the simulation does. Activations
    saturate at -128; :func:`saturate_like_engines` changes the simulation to do the same. Codes may differ where a sum
    in another order moves a value across the edge between two levels.

    With `batches`, and for "onnxruntime", quantizers follow the rules of the engine, see
    :func:`klquant.backends.onnx.quantize`. Thresholds of the simulation take precedence over new ones.
    """
    _check(model)
    _need_onnx()
    from .qdq import place

    check_engine(engine)
    traced = trace(model, example, dynamic_batch=dynamic_batch, input_names=input_names, output_names=output_names)
    result = place(traced, engine, None if batches is None else _Arrays(model, batches, traced.inputs))
    if dynamic_batch:
        _warn_of_fixed_batch_size(result)
    if path is not None:
        result.save(path)
    return result


class _Arrays:
    """Batches as arrays by ONNX input name, which can be iterated more than once."""

    def __init__(self, model: nn.Module, batches: Iterable[Any], inputs: Mapping[str, str]) -> None:
        if isinstance(batches, Iterator):
            raise InvalidInputError(
                f"`batches` must be iterable more than once, got the one-shot "
                f"{type(batches).__name__}; pass a list or a DataLoader"
            )
        self._model, self._batches, self._inputs = model, batches, inputs

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._batches:
            tensors = named_tensors(self._model, batch).items()
            yield {self._inputs.get(name, name): tensor.numpy(force=True) for name, tensor in tensors}


def _warn_of_fixed_batch_size(result: "QDQModel") -> None:
    """Warn if torch fixed the batch size."""
    shapes = [value.type.tensor_type.shape.dim for value in result.model.graph.input]
    if any(shapes) and not any(shape[0].dim_param for shape in shapes if shape):
        warn("the batch size is fixed to that of the example, because the model computes with it, perhaps by len(x)")


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
