"""Simulate INT8 inference: round weights and activations where an engine does."""

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from klquant.errors import InvalidInputError

from ..settings import Observe
from ..thresholds import LayerThreshold
from .model.calls import Calls, layer_of
from .model.edits import copy_model, replace_module
from .model.forward import Where, observed_at
from .model.layers import LayerWrapper, Tap, channel_axis, inner_layer, observed_layers, point_name, weighted_layers
from .model.products import hide


class QuantizedLayer(LayerWrapper):
    """A layer whose input (or output) and weights are rounded to what INT8 can represent."""

    qmin: int | None = None
    """Lowest level of the activation; None for that of :func:`fake_quantize`; see :func:`saturate_like_engines`."""

    def __init__(self, layer: nn.Module, scale: float, observe: Observe, num_bits: int = 8) -> None:
        super().__init__(layer)
        self.observe = observe
        self.num_bits = num_bits
        self.scale: torch.Tensor
        # not by register_buffer, which refuses the name if the layer has an attribute of this name
        self._buffers["scale"] = torch.tensor(scale, dtype=torch.float32, device=_device_of(inner_layer(layer)))

        # PyTorch's fused kernels (TransformerEncoderLayer) bypass a layer and read its weights, unless it has hooks
        hide(self)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output in INT8 arithmetic."""
        if self.observe == "inputs":
            if args:
                args = (self._rounded(args[0]), *args[1:])
            else:
                kwargs["input"] = self._rounded(kwargs["input"])
            result: torch.Tensor = self.layer(*args, **kwargs)
            return result
        return self._rounded(self.layer(*args, **kwargs))

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedLayer":
        """Move the scale with the layer, but keep it in float32: ``half()`` would round it."""
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scale = scale.to(self.scale.device) if self.scale.is_floating_point() else self.scale
        return self

    def round_weight(self, weight: torch.Tensor, axis: int | None) -> torch.Tensor:
        """Return the constant operand of a function, rounded per channel."""
        scale = channel_scales(weight.detach(), axis, self.num_bits)
        return fake_quantize(weight, scale, axis=axis, num_bits=self.num_bits)

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        return fake_quantize(x, self.scale, num_bits=self.num_bits, qmin=self.qmin)


def _device_of(layer: Any) -> torch.device:
    device: torch.device = layer.device if isinstance(layer, Tap) else layer.weight.device
    return device


def fake_quantize(
    x: torch.Tensor, scale: torch.Tensor, *, axis: int | None = None, num_bits: int = 8, qmin: int | None = None
) -> torch.Tensor:
    """Return ``clamp(round_half_even(x / scale), -127, 127) * scale``: :func:`klquant.fake_quantize` for tensors.

    Parameters
    ----------
    x : torch.Tensor, floating point
    scale : torch.Tensor, float32, 0-d or of shape (x.shape[axis],)
        0 marks a dead channel, which becomes 0.
    axis : int, optional
        Channel axis of `x`.
    num_bits : int
        The levels are -127 .. 127 for 8.
    qmin : int, optional
        Lowest level, if it is another one: engines saturate at -128.

    Returns
    -------
    torch.Tensor, shape and dtype of `x`
        Its gradient is that of an identity, and 0 for values that are clipped.

    Raises
    ------
    InvalidInputError
        For an `x` of integers, a `scale` per channel without `axis`, `num_bits` other than 2 to 16.
    """
    if not x.is_floating_point():
        raise InvalidInputError(f"`x` must be floating point, got {x.dtype}")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    steps = scale.to(wide.dtype)
    if axis is not None:
        steps = steps.reshape([-1 if k == axis % x.ndim else 1 for k in range(x.ndim)])
    elif steps.ndim:
        raise InvalidInputError(f"`scale` must be 0-d when `axis` is not given, got shape {tuple(steps.shape)}")
    lowest = -qmax(num_bits) if qmin is None else qmin
    clamped = (wide / torch.where(steps > 0, steps, 1.0)).clamp(lowest - 0.5, qmax(num_bits) + 0.5)
    levels = clamped.round().clamp(lowest, qmax(num_bits))
    if clamped.requires_grad:
        levels = clamped + (levels - clamped).detach()  # the same values: the difference is exact
    return (levels * steps + 0.0).to(x.dtype)  # + 0.0: INT8 has no negative zero


def qmax(num_bits: int) -> int:
    """Return the highest level: 127 for 8 bits."""
    if not 2 <= num_bits <= 16:
        raise InvalidInputError(f"`num_bits` must be 2 to 16, got {num_bits}")
    return (1 << (num_bits - 1)) - 1


def quantize_weights(
    model: nn.Module, *, num_bits: int | Mapping[str, int] = 8, dead_channel: float = 0.0
) -> dict[str, torch.Tensor]:
    """Return the scales of the weights of each layer: ``max |w_c| / 127`` per output channel.

    Parameters
    ----------
    model : torch.nn.Module
        Fold it first, because folding changes the weights. It is not changed.
    num_bits : int, or mapping of layer names to int
        Layers that a mapping lacks are left out.
    dead_channel : float
        A channel is dead if all its weights are 0, or all ``|w|`` are below this; 1e-4 in the original description.

    Returns
    -------
    dict
        float32 tensors of shape (output channels,) by qualified layer name. The scale of a dead channel is 0.

    Raises
    ------
    InvalidInputError
        For NaN or infinite weights, naming the layer; for `num_bits` other than 2 to 16.
    """
    scales = {}
    for name, layer in weighted_layers(model):
        bits = num_bits if isinstance(num_bits, int) else num_bits.get(name)
        if bits is None:
            continue
        weight = inner_layer(layer).weight.detach()
        if not weight.isfinite().all():
            raise InvalidInputError(f"layer `{name}`: weights must be finite, got NaN or infinity")
        scales[name] = channel_scales(weight, channel_axis(inner_layer(layer)), bits, dead_channel)
    return scales


def channel_scales(weight: torch.Tensor, axis: int | None, num_bits: int, dead_channel: float = 0.0) -> torch.Tensor:
    """Return ``max |w_c| / 127`` of each channel, of all values without an axis; 0 marks a dead channel."""
    amax = weight.float().abs().amax([k for k in range(weight.ndim) if axis is None or k != axis % weight.ndim])
    alive = (amax > 0) & (amax >= dead_channel)
    smallest = torch.finfo(torch.float32).tiny  # a scale of 0 would mark a dead channel
    return torch.where(alive, (amax / qmax(num_bits)).clamp_min(smallest), 0.0)


def simulate(
    model: nn.Module,
    weight_scales: Mapping[str, torch.Tensor],
    thresholds: Mapping[str, LayerThreshold],
    *,
    observe: Where = "inputs",
) -> nn.Module:
    """Return a copy of the model that computes in floating point what an INT8 engine computes.

    Parameters
    ----------
    model : torch.nn.Module
        The model that was observed; it is not changed.
    weight_scales, thresholds : mapping
        The results of :func:`quantize_weights` and :func:`search_thresholds`. A layer without a threshold, because it
        was never called, stays in floating point.
    observe : {"inputs", "outputs"}, or a mapping of layer names to these
        Where the thresholds were collected.

    Returns
    -------
    torch.nn.Module
        Each quantized layer is a :class:`QuantizedLayer` under its old name.

    Raises
    ------
    InvalidInputError
        For a threshold of a layer that the model lacks, or without weight scales; for an unknown `observe`.
    """
    simulated = copy_model(model)
    simulate_in_place(simulated, weight_scales, thresholds, observe)
    return simulated


def simulate_in_place(
    model: nn.Module,
    weight_scales: Mapping[str, torch.Tensor],
    thresholds: Mapping[str, LayerThreshold],
    observe: Where,
) -> None:
    """Do what :func:`simulate` does, to the model itself."""
    layers = dict(observed_layers(model))
    if unknown := thresholds.keys() - layers.keys():
        raise InvalidInputError(
            f"`thresholds` must be those of this model, got layers that it lacks: {sorted(unknown)}"
        )
    taps = {name for name, layer in layers.items() if isinstance(layer, Tap)}
    if missing := thresholds.keys() - weight_scales.keys() - taps:
        raise InvalidInputError(
            f"`weight_scales` must hold every layer with a threshold, got none of {sorted(missing)}"
        )
    shared = {layer_of(name): found.num_bits for name, found in thresholds.items()}
    for name, layer in weighted_layers(model):
        if name in shared and name in weight_scales:
            _round_weight(inner_layer(layer), weight_scales[name], shared[name])
    for name, found in thresholds.items():
        place = "inputs" if name in taps else observed_at(name, observe) or "inputs"
        replace_module(layers[name], QuantizedLayer(layers[name], found.scale, place, found.num_bits))
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]  # a folded ReLU would overwrite what its gradient needs
        if hasattr(type(module), "save_pretrained"):
            vars(module)["save_pretrained"] = _refuse_to_save


def _refuse_to_save(*args: Any, **kwargs: Any) -> NoReturn:
    """Take the place of transformers' method, whose files would be loaded with new random weights."""
    raise InvalidInputError(
        "expected a float model to save with save_pretrained, got a simulation of INT8, whose weights have other names "
        "in the file; save the calibration (result.calibration.save) and requantize the float model by it"
    )


def _round_weight(layer: Any, scale: torch.Tensor, num_bits: int) -> None:
    weight = fake_quantize(layer.weight.detach(), scale, axis=channel_axis(layer), num_bits=num_bits)
    layer.weight = nn.Parameter(weight)
    layer.requires_grad_(requires_grad=False)


def saturate_like_engines(model: nn.Module) -> nn.Module:
    """Return a copy of a simulated model whose activations saturate at -128 instead of -127.

    ``QuantizeLinear`` and the engines do the same: negative activations have one level more, weights do not. The copy
    computes what the model of :func:`export_onnx` computes.

    Parameters
    ----------
    model : torch.nn.Module
        The result of :func:`simulate`, or `model` of :func:`quantize`; it is not changed.

    Returns
    -------
    torch.nn.Module

    Raises
    ------
    InvalidInputError
        For a model without quantized layers.
    """
    model = copy_model(model)
    for layer in quantized_layers(model).values():
        layer.qmin = -qmax(layer.num_bits) - 1
    return model


def rounded_layers(model: nn.Module) -> Iterator[tuple[str, Any, int]]:
    """Yield name, layer and number of bits of each layer of a simulated model whose weight is rounded."""
    for name, module in model.named_modules():
        if isinstance(module, (QuantizedLayer, Calls)) and not isinstance(module.layer, Tap):
            points = [one for one in module.modules() if isinstance(one, QuantizedLayer)]
            if points:
                yield point_name(name), inner_layer(module.layer), points[0].num_bits


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the quantized layers of a simulated model by qualified name; raise InvalidInputError if none."""
    modules = model.named_modules()
    found = {point_name(name): module for name, module in modules if isinstance(module, QuantizedLayer)}
    if not found:
        raise InvalidInputError("the model must be the result of simulate(), got one without quantized layers")
    return found
