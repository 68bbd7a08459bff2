"""Fine-tune a simulated model (QAT): weights become trainable, and are rounded each time that they are used."""

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from klquant.errors import InvalidInputError

from .model.edits import copy_model
from .model.layers import channel_axis
from .model.products import hide
from .simulation import channel_scales, fake_quantize, quantized_layers, rounded_layers


class _Rounding(nn.Module):
    """Rounds the weights of a layer by the scales that they have now."""

    def __init__(self, axis: int, num_bits: int) -> None:
        super().__init__()
        self._axis, self._num_bits = axis, num_bits
        hide(self)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        scales = channel_scales(weight.detach(), self._axis, self._num_bits)
        return fake_quantize(weight, scales, axis=self._axis, num_bits=self._num_bits)


def unfreeze_weights(model: nn.Module) -> nn.Module:
    """Return a copy of a simulated model that can be trained.

    The gradient of rounding is that of an identity, and 0 for what is clipped (straight-through estimator).

    Parameters
    ----------
    model : torch.nn.Module
        ``result.model`` of :func:`quantize`; it is not changed.

    Returns
    -------
    torch.nn.Module, in eval mode
        All its floating point parameters require gradients. Weights of quantized layers are kept in floating point and
        rounded in each call, by the scale ``max |w_c| / 127`` of each channel at that time. The thresholds of
        activations stay as they are. It computes what `model` computes until it is trained.

    Raises
    ------
    InvalidInputError
        For a model without quantized layers, or that is unfrozen already.

    Notes
    -----
    Save it by ``state_dict()``: PyTorch cannot pickle parametrized modules.

    A simulation rounds each layer for itself. So a weight that a layer shares, such as a head with a table of
    embeddings, is separate in it. ``model.head.parametrizations.weight.original = model.table.weight`` trains both as
    one again.
    """
    model = copy_model(model)
    quantized_layers(model)  # raises for a model without any
    for name, inner, num_bits in list(rounded_layers(model)):
        if parametrize.is_parametrized(inner):
            raise InvalidInputError(f"expected the model of a result, got layer `{name}`, which can be trained already")
        if "weight" in inner._parameters:
            rounding = _Rounding(channel_axis(inner), num_bits)
            parametrize.register_parametrization(inner, "weight", rounding)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return model


def freeze_weights(model: nn.Module) -> nn.Module:
    """Return a copy of a fine-tuned model whose weights are rounded for good, as in ``result.model``.

    Parameters
    ----------
    model : torch.nn.Module
        From :func:`unfreeze_weights`, trained; it is not changed.

    Returns
    -------
    torch.nn.Module, in eval mode
        It computes what `model` computes in eval mode; :func:`export_onnx` takes it.

    Raises
    ------
    InvalidInputError
        For a model without quantized layers.
    """
    model = copy_model(model).eval()
    quantized_layers(model)  # raises for a model without any
    for _, inner, _ in list(rounded_layers(model)):
        if parametrize.is_parametrized(inner, "weight"):
            _keep_rounded(inner)
    return model.requires_grad_(requires_grad=False)


def _keep_rounded(layer: Any) -> None:
    """Make the rounded weight the parameter; PyTorch's function for this would break the layer's other copies."""
    weight = layer.weight.detach()
    del layer.parametrizations
    layer.__class__ = type(layer).__bases__[0]
    layer.weight = nn.Parameter(weight)
