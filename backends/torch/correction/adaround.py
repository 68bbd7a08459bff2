"""AdaRound: round the weights of each layer so that its outputs on some data keep their values.

:mod:`klquant.backends.rounding` chooses the integers. Here are the inputs of the layers, taken from the float model.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from klquant.errors import InvalidInputError

from ...batches import progress_bar
from ...rounding import MAX_INPUTS, Array, portions, round_adaptively
from ..model.calls import layer_of
from ..model.forward import Forward, run_observed
from ..model.layers import TRANSPOSED, inner_layer, weighted_layers
from ..simulation import qmax, rounded_layers

POSITIONS = 4096  # of the inputs of a layer, for each batch


def adapt_rounding(
    simulated: nn.Module,
    reference: nn.Module,
    weight_scales: Mapping[str, torch.Tensor],
    batches: Iterable[Any],
    *,
    forward: Forward,
    progress: bool,
) -> None:
    """Replace the rounded weights of a simulated model, in place, by those that change its layers' outputs least.

    Parameters
    ----------
    simulated : torch.nn.Module
        Transposed convolutions, layers with more than `MAX_INPUTS` inputs for each output and those that no batch
        reaches keep their weights.
    reference : torch.nn.Module
        The float model that was simulated. Its layers have the weights before rounding, and it computes their inputs.
    weight_scales : mapping
        Of each layer, shape (output channels,).
    batches : iterable
        Some data, iterated once for each gigabyte of sums.
    forward : callable
        How to run the model on a batch.
    progress : bool
        Show a bar: the layers are done one after the other.
    """
    floats = {name: inner_layer(layer) for name, layer in weighted_layers(reference)}
    rounded = {name: (layer, bits) for name, layer, bits in rounded_layers(simulated) if _can_round(floats[name])}
    with progress_bar("rounding weights" if progress else "", rounded) as advance:
        for names in portions({name: _size(floats[name]) for name in rounded}):
            sums = {name: _Products(floats[name]) for name in names}
            _observe(reference, sums, batches, forward)
            for name, products in sums.items():
                layer, bits = rounded[name]
                if products.samples:
                    weight = _rounded(floats[name], weight_scales[name], products, qmax(bits))
                    layer.weight = nn.Parameter(weight, requires_grad=False)
                advance()


def _can_round(layer: Any) -> bool:
    return not isinstance(layer, TRANSPOSED) and layer.weight[0].numel() <= MAX_INPUTS


def _size(layer: Any) -> int:
    """Return the number of sums of products of a layer."""
    size: int = getattr(layer, "groups", 1) * layer.weight[0].numel() ** 2
    return size


def _observe(model: nn.Module, sums: Mapping[str, "_Products"], batches: Iterable[Any], forward: Forward) -> None:
    def observer(name: str, tensor: torch.Tensor) -> None:
        if layer_of(name) in sums:
            sums[layer_of(name)].update(tensor)

    if not run_observed(model, batches, observer, forward=forward):
        raise InvalidInputError("expected at least one batch to round weights by, got none")


class _Products:
    """The sum of x x^T over the inputs x of each group of a layer."""

    def __init__(self, layer: Any) -> None:
        self._layer, self.samples = layer, 0
        size = layer.weight[0].numel()
        self.sums: Array = np.zeros((getattr(layer, "groups", 1), size, size))

    def update(self, x: torch.Tensor) -> None:
        """Add some of the inputs of a batch."""
        rows = _patches(self._layer, x)
        if not rows.isfinite().all():
            raise InvalidInputError("activations must be finite, got NaN or infinity")
        self.sums += torch.matmul(rows.transpose(1, 2), rows).cpu().numpy()
        self.samples += rows.shape[1]


def _patches(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Return what a layer multiplies by its weights at some positions, float64 of shape (groups, positions, inputs)."""
    if isinstance(layer, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
        return rows[_some(len(rows))].double()[None]
    dims = len(layer.kernel_size)
    x = x if x.ndim == dims + 2 else x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    for k, (size, step, gap) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        x = x.unfold(2 + k, gap * (size - 1) + 1, step)[..., ::gap]
    places = (len(x), *x.shape[2 : 2 + dims])
    chosen = torch.unravel_index(_some(math.prod(places)), places)
    rows = x.movedim(1, dims + 1)[chosen].double()  # (positions, channels, kernel)
    return rows.reshape(len(rows), layer.groups, -1).transpose(0, 1)


def _some(number: int) -> torch.Tensor:
    """Return up to `POSITIONS` of so many numbers, evenly spread."""
    return torch.arange(0, number, -(-number // POSITIONS) or 1)


def _rounded(layer: Any, scale: torch.Tensor, products: _Products, highest: int) -> torch.Tensor:
    """Return the weight of a layer on the levels of its scales."""
    weight = layer.weight.detach()
    groups = np.split(weight.double().cpu().numpy().reshape(len(weight), -1), len(products.sums))
    steps = np.split(scale.double().cpu().numpy().reshape(-1, 1), len(groups))
    found = (
        round_adaptively(rows, step, one, products.samples).clip(-highest, highest) * step
        for rows, step, one in zip(groups, steps, products.sums, strict=True)
    )
    return torch.from_numpy(np.concatenate(list(found))).reshape(weight.shape).to(weight)
