"""From a simulated model to an ONNX model that an engine executes in INT8."""

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
from ..model.layers import inner_layer
from ..simulation import quantized_layers
from .trace import named_tensors, trace

if TYPE_CHECKING:
    from ...onnx.quantization import QDQModel
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
    """Return a simulated model as an ONNX model with QuantizeLinear and DequantizeLinear.

    Parameters
    ----------
    model : torch.nn.Module
        ``result.model`` of :func:`quantize`, or what :func:`simulate` returned, of 8 bits and float32. It is not
        changed.
    example
        A batch to trace the model with, in any form that :func:`quantize` takes.
    path : path, optional
        Where to write the model too, whole or not at all.
    engine : {"tensorrt", "openvino", "onnxruntime"}
        For which engine.
    batches : iterable, optional
        Calibration data, for what the engine wants in INT8 and the simulation does not round: sums, poolings, what
        leaves a layer. Without it, such nodes stay in floating point.
    dynamic_batch : bool
        Leave the batch size open, where the model allows it: dimension 0 of the first tensor and of those that have as
        many samples.
    input_names, output_names : sequence of str, optional
        By default the names of the arguments, and torch's names.

    Returns
    -------
    QDQModel
        `model`, the `thresholds` by tensor and what was `skipped`.

    Raises
    ------
    InvalidInputError
        For a model that is not simulated, in training mode, or not of 8 bits and float32, naming the layer; for two
        layers that round one tensor differently, where the engine cannot.
    ModelError
        If torch cannot export the model; its own error is the cause.
    MissingDependencyError
        Without onnx, onnxruntime, onnxscript, or with a torch before 2.9.

    Warns
    -----
    CalibrationWarning
        Naming them, for what stays in floating point; for a batch size that stays fixed in spite of `dynamic_batch`.

    Notes
    -----
    For "tensorrt" and "openvino", without `batches`, the model computes what the simulation does and nothing else, with
    activations that saturate at -128: :func:`saturate_like_engines` makes the simulation do so too. Codes differ where
    floating point sums in another order and a value lies on the edge between two levels.

    With `batches`, and for "onnxruntime", the quantizers stand by the engine's rules, see
    :func:`klquant.backends.onnx.quantize`; thresholds of the simulation win over new ones.
    """
    _check(model)
    _need_onnx()
    from .qdq import place

    check_engine(engine)
    traced = trace(model, example, dynamic_batch=dynamic_batch, input_names=input_names, output_names=output_names)
    result = place(traced, engine, None if batches is None else _Arrays(model, batches, traced.inputs))
    if dynamic_batch:
        _tell_fixed(result)
    if path is not None:
        result.save(path)
    return result


class _Arrays:
    """Batches as an ONNX model takes them, to be gone through more than once."""

    def __init__(self, model: nn.Module, batches: Iterable[Any], inputs: Mapping[str, str]) -> None:
        if isinstance(batches, Iterator):
            raise InvalidInputError(
                f"`batches` must be an iterable that can be gone through twice, got the one-shot "
                f"{type(batches).__name__}; pass a list or a DataLoader"
            )
        self._model, self._batches, self._inputs = model, batches, inputs

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._batches:
            tensors = named_tensors(self._model, batch).items()
            yield {self._inputs.get(name, name): tensor.numpy(force=True) for name, tensor in tensors}


def _tell_fixed(result: "QDQModel") -> None:
    """Warn of a batch size that torch fixed."""
    shapes = [value.type.tensor_type.shape.dim for value in result.model.graph.input]
    if any(shapes) and not any(shape[0].dim_param for shape in shapes if shape):
        warn("the batch size is fixed to that of the example: the model computes with it, perhaps by len(x)")


def _need_onnx() -> None:
    if TorchVersion(torch.__version__) < "2.9":  # 2.8 exports one branch of those that depend on data, and is silent
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
        dtype = inner_layer(layer.layer).weight.dtype
        if layer.num_bits != 8:
            raise InvalidInputError(f"layer `{name}` must be of 8 bits to be exported, got {layer.num_bits}")
        if dtype != torch.float32:
            raise InvalidInputError(f"layer `{name}` must be in float32 to be exported, got {dtype}; use model.float()")
