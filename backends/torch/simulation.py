"""INT8 inference simulated: weights and activations pass through quantize and dequantize where an engine would."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from klquant.errors import InvalidInputError

from .calibration import LayerThreshold
from .layers import LayerWrapper, channel_axis, inner_layer, replace_module, weighted_layers
from .running import Observe, check_observe, copy_model

DEAD_CHANNEL = 1e-4  # largest |weight| below which a channel is taken as dead
QMAX = 127


class QuantizedLayer(LayerWrapper):
    """A layer whose input (or output) and weights take only the values that INT8 can represent."""

    def __init__(self, layer: nn.Module, scale: float, observe: Observe) -> None:
        super().__init__(layer)
        self.observe = observe
        self.scale: torch.Tensor
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32, device=inner_layer(layer).weight.device))

        # PyTorch's fused kernels (TransformerEncoderLayer) go round layers by their weights, but not if they have hooks
        self.register_forward_pre_hook(_keep_calling)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output as INT8 arithmetic would give it."""
        if self.observe == "inputs":
            if args:
                args = (fake_quantize(args[0], self.scale), *args[1:])
            else:
                kwargs["input"] = fake_quantize(kwargs["input"], self.scale)
            result: torch.Tensor = self.layer(*args, **kwargs)
            return result
        return fake_quantize(self.layer(*args, **kwargs), self.scale)


def _keep_calling(module: nn.Module, args: Any) -> None:
    pass


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
        steps = steps.reshape([-1 if k == axis % x.ndim else 1 for k in range(x.ndim)])
    elif steps.ndim:
        raise InvalidInputError(f"`scale` must be 0-d when `axis` is not given, got shape {tuple(steps.shape)}")
    levels = (wide / torch.where(steps > 0, steps, 1.0)).round().clamp(-QMAX, QMAX)
    return (levels * steps + 0.0).to(x.dtype)  # + 0.0: INT8 has no negative zero


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
    check_observe(observe)
    model = copy_model(model)
    layers = dict(weighted_layers(model))
    if unknown := thresholds.keys() - layers.keys():
        raise InvalidInputError(
            f"`thresholds` must be those of this model, got layers that it lacks: {sorted(unknown)}"
        )
    for name, layer in layers.items():
        if name not in thresholds:
            continue
        inner = inner_layer(layer)
        weight = fake_quantize(inner.weight.detach(), weight_scales[name], axis=channel_axis(inner))
        inner.weight = nn.Parameter(weight, requires_grad=False)
        scale = thresholds[name].threshold / QMAX
        model = replace_module(model, layer, QuantizedLayer(layer, scale, observe))
    return model
