"""INT8 inference simulated: weights and activations pass through quantize and dequantize where an engine would."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from klquant.errors import InvalidInputError

from .calibration import LayerThreshold
from .layers import LayerWrapper, channel_axis, inner_layer, replace_module, weighted_layers
from .running import Observe

DEAD_CHANNEL = 1e-4  # largest |weight| below which a channel is taken as dead
QMAX = 127


class QuantizedLayer(LayerWrapper):
    """A layer whose input (or output) and weights take only the values that INT8 can represent."""

    def __init__(self, layer: nn.Module, scale: float, observe: Observe) -> None:
        super().__init__(layer)
        self.observe = observe
        self.scale: torch.Tensor
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32, device=inner_layer(layer).weight.device))

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output as INT8 arithmetic would give it."""
        if self.observe == "inputs":
            result: torch.Tensor = self.layer(fake_quantize(x, self.scale), *args, **kwargs)
            return result
        return fake_quantize(self.layer(x, *args, **kwargs), self.scale)


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, *, axis: int | None = None) -> torch.Tensor:
    """Return ``clamp(round_half_even(x / scale), -127, 127) * scale``, as :func:`klquant.fake_quantize` on tensors.

    Parameters
    ----------
    x : torch.Tensor, floating point
    scale : torch.Tensor, float32, 0-d or of shape (x.shape[axis],)
        0 marks a dead channel: all zeros.
    axis : int, optional
        Channel axis of `x`.

    Returns
    -------
    torch.Tensor, shape and dtype of `x`
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    steps = scale.to(wide.dtype)
    if axis is not None:
        steps = steps.reshape([-1 if k == axis else 1 for k in range(x.ndim)])
    levels = (wide / torch.where(steps > 0, steps, 1.0)).round().clamp(-QMAX, QMAX)
    return (levels * steps).to(x.dtype)


def quantize_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the scales of the weights of each layer: ``max |w_c| / 127`` per output channel.

    Parameters
    ----------
    model : torch.nn.Module
        Folded, if it is to be: folding changes the weights. It is not changed.

    Returns
    -------
    dict
        float32 tensors of shape (output channels,) by qualified layer name. The scale of a dead channel
        (all ``|w| < 1e-4``) is 0.

    Raises
    ------
    InvalidInputError
        For NaN or infinite weights, naming the layer.
    """
    scales = {}
    for name, layer in weighted_layers(model):
        weight = inner_layer(layer).weight.detach()
        if not weight.isfinite().all():
            raise InvalidInputError(f"layer `{name}`: weights must be finite, got NaN or infinity")
        others = [k for k in range(weight.ndim) if k != channel_axis(inner_layer(layer))]
        amax = weight.float().abs().amax(others)
        scales[name] = torch.where(amax < DEAD_CHANNEL, 0.0, amax / QMAX)
    return scales


def simulate(
    model: nn.Module,
    weight_scales: Mapping[str, torch.Tensor],
    thresholds: Mapping[str, LayerThreshold],
    *,
    observe: Observe = "inputs",
) -> nn.Module:
    """Return a copy of the model that computes what an INT8 engine would, in floating point.

    Parameters
    ----------
    model : torch.nn.Module
        The model that was observed; it is not changed.
    weight_scales, thresholds : mapping
        The results of :func:`quantize_weights` and :func:`search_thresholds`. A layer without a threshold (one
        that was never called) stays in floating point.
    observe : {"inputs", "outputs"}
        Where the thresholds were collected.

    Returns
    -------
    torch.nn.Module
        Each quantized layer is a :class:`QuantizedLayer` under its old name.
    """
    model = copy.deepcopy(model)
    for name, layer in list(weighted_layers(model)):
        if name not in thresholds:
            continue
        inner = inner_layer(layer)
        weight = fake_quantize(inner.weight.detach(), weight_scales[name], axis=channel_axis(inner))
        inner.weight = nn.Parameter(weight, requires_grad=False)
        scale = thresholds[name].threshold / QMAX
        model = replace_module(model, layer, QuantizedLayer(layer, scale, observe))
    return model
