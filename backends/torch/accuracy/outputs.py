"""Compare the outputs of a float module with those of its quantized form."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from ...accuracy.classes import Array
from ...accuracy.comparison import Comparison, Metric, compare_models
from ...batches import numbered, tracked
from ..model.dataflow import tensors_in
from ..model.forward import Forward, call_model, check_eval
from ..simulation import rounded_layers


def named_outputs(model: nn.Module, batch: Any, forward: Forward) -> dict[str, Array]:
    """Return the tensors that a model returns, numbered where there are several."""
    with torch.no_grad():
        tensors = [tensor.detach().cpu() for tensor in tensors_in(forward(model, batch))]
    names = ["output"] if len(tensors) == 1 else [f"output {k}" for k in range(len(tensors))]
    return {name: _array(tensor) for name, tensor in zip(names, tensors, strict=True)}


def _array(tensor: torch.Tensor) -> Array:
    wide = tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
    array: Array = wide.numpy().copy()
    return array


def compare(
    float_model: nn.Module,
    quantized_model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward = call_model,
    labels: Array | None = None,
    metric: Metric | None = None,
    progress: bool = True,
) -> Comparison:
    """Run a float module and its quantized form on the same data and compare outputs, time and size.

    Parameters
    ----------
    float_model, quantized_model : torch.nn.Module, in eval mode
        The latter for example the `model` of what :func:`quantize` returns.
    batches : iterable
        Data that calibration has not seen; iterated once.
    forward : callable (model, batch) -> output
        How to run a model on a batch.
    labels : array, shape (samples,), integers, optional
        The true class of each sample, in the order of the batches.
    metric : callable, optional
        From the outputs of both models, each a list with one mapping of arrays by name for each batch, to a number. The
        names are ``output``, or ``output 0``, ``output 1``, ... of several tensors.
    progress : bool
        Show a bar on a terminal or in a notebook.

    Returns
    -------
    Comparison
        As of :func:`klquant.backends.onnx.compare`. The times are those of the modules as they are: a simulation of
        INT8 is slower than the float model.

    Raises
    ------
    InvalidInputError
        For a module in training mode, outputs of other shapes, labels that do not fit, no batches.

    Notes
    -----
    The sizes are those of parameters and buffers. The weights of simulated layers count with their number of bits.
    """
    models = float_model, quantized_model
    for model in models:
        check_eval(model)
    runs = tuple(partial(named_outputs, model, forward=forward) for model in models)
    shown = (batch for _, batch in numbered(tracked(batches, "comparing" if progress else "")))
    sizes = num_bytes(float_model), num_bytes(quantized_model)
    return compare_models((runs[0], runs[1]), shown, timed=runs, sizes=sizes, labels=labels, metric=metric)


def num_bytes(model: nn.Module) -> int:
    """Return the size of parameters and buffers, with the weights of simulated layers in their number of bits."""
    tensors = {id(one): one for one in (*model.parameters(), *model.buffers())}
    sizes = {key: float(one.numel() * one.element_size()) for key, one in tensors.items()}
    for _, layer, num_bits in rounded_layers(model):
        sizes[id(layer.weight)] = layer.weight.numel() * num_bits / 8
    return round(sum(sizes.values()))
