"""Fold BatchNorm and ReLU into the layer that feeds them, or say why not.

A pair is folded only if one run of the model shows that it is safe: the layer is called once, what it returns
is used once, by that BatchNorm, which is called once. For a ReLU it is enough that nothing else uses what the
layer returns: relu(relu(x)) = relu(x), so the ReLU itself can stay for its other callers. Both functions return
a new model; the one they are given stays as it is.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from .calls import Call, count_uses, record_calls
from .layers import BATCH_NORMS, RELUS, TRANSPOSED, WEIGHTED, LayerReLU, replace_module, weighted_layers
from .running import Forward, call_model, check_eval, copy_model

_NO_LAYER = "no convolution or linear layer feeds it (subclasses and parametrized ones are left alone)"
_RELU_FUNCTIONS = {torch.relu, torch.Tensor.relu, nn.functional.relu}


class Fold(NamedTuple):
    """What became of one BatchNorm or ReLU."""

    module: str
    """Qualified name of the BatchNorm or ReLU; of the layer for a functional ReLU."""
    kind: str
    """`batch_norm` or `relu`."""
    into: str | None
    """Qualified name of the layer that feeds it, if one does."""
    reason: str
    """Why it was left alone; empty where it was folded."""


def fold_batch_norm(model: nn.Module, batch: Any, *, forward: Forward = call_model) -> tuple[nn.Module, list[Fold]]:
    """Fold every BatchNorm that can be into the convolution or linear layer that feeds it.

    With ``factor = gamma / sqrt(var + eps)`` along the output channels, ``w' = w * factor`` and
    ``b' = beta + (b - mean) * factor``; the BatchNorm becomes an identity.

    Parameters
    ----------
    model : torch.nn.Module, in eval mode
    batch
        One batch of input, to see what feeds what.
    forward : callable (model, batch) -> output
        How to run the model on a batch.

    Returns
    -------
    model : torch.nn.Module
        A folded copy.
    folds : list of Fold
        One entry for each BatchNorm.

    Raises
    ------
    InvalidInputError
        If a module is in training mode: BatchNorm would use the statistics of the batch.

    Notes
    -----
    The arithmetic is ``torch.nn.utils.fusion``'s, in float64, rounded once to the dtype of the layer. Left alone are
    layers with shared or parametrized weights or hooks, grouped transposed convolutions, BatchNorm without running
    statistics and after a linear layer on anything but (batch, features).
    """
    check_eval(model)
    folded = copy_model(model)
    calls, expected = record_calls(folded, lambda: forward(folded, batch))
    uses = count_uses(folded)
    folds = []
    for name, norm in [(name, m) for name, m in folded.named_modules() if type(m) in BATCH_NORMS]:
        feeding = _feeding_call(name, calls)
        layer = folded.get_submodule(feeding.module) if feeding else None
        reason = _why_not(name, norm, layer, feeding, calls, uses)
        if not reason:
            _fuse(layer, norm)
            folded = replace_module(folded, norm, nn.Identity().eval())
            norm.forward = _identity  # for models that also hold it where no name is registered, as in a plain list
        folds.append(
            Fold(name, "batch_norm", feeding.module if feeding and not isinstance(layer, RELUS) else None, reason)
        )
    return _unless_changed(model, folded, folds, expected, lambda copied: forward(copied, batch))


def fold_relu(model: nn.Module, batch: Any, *, forward: Forward = call_model) -> tuple[nn.Module, list[Fold]]:
    """Join every ReLU (or ReLU6) with the convolution or linear layer that feeds it, so that they are observed as one.

    Parameters
    ----------
    model, batch, forward
        As for :func:`fold_batch_norm`; fold BatchNorm first.

    Returns
    -------
    model : torch.nn.Module
        A copy in which such a layer is a :class:`LayerReLU` under its old name. The ReLU stays where it was: a
        second one changes nothing, and a module that is used in several places goes on serving the others.
    folds : list of Fold
        One entry for each layer that was joined with its ReLU.

    Raises
    ------
    InvalidInputError
        If a module is in training mode.
    """
    check_eval(model)
    folded = copy_model(model)
    calls, expected = record_calls(folded, lambda: forward(folded, batch))
    folds = []
    for name, layer in list(weighted_layers(folded)):
        relu = None if isinstance(layer, LayerReLU) else _following_relu(folded, layer, calls[name])
        if relu is not None:
            relu_name, relu_module = relu
            folded = replace_module(folded, layer, LayerReLU(layer, copy.deepcopy(relu_module)))
            folds.append(Fold(relu_name or name, "relu", name, reason=""))
    return _unless_changed(model, folded, folds, expected, lambda copied: forward(copied, batch))


def _identity(x: torch.Tensor) -> torch.Tensor:
    """Stand in for the forward of a folded BatchNorm."""
    return x


def _unless_changed(
    model: nn.Module,
    folded: nn.Module,
    folds: list[Fold],
    expected: list[torch.Tensor],
    run: Callable[[nn.Module], Any],
) -> tuple[nn.Module, list[Fold]]:
    """Return the folded model, or an unfolded copy if its output on the batch is another one.

    The last defence, against uses that no recording sees: compiled functions, modules kept in plain lists, ...
    """
    if not any(not fold.reason for fold in folds):
        return folded, folds
    got = record_calls(folded, lambda: run(folded)).output
    if len(got) == len(expected) and all(map(_nearly_equal, got, expected)):
        return folded, folds
    reason = "folding changed the output of the model"
    return copy_model(model), [fold if fold.reason else fold._replace(reason=reason) for fold in folds]


def _nearly_equal(got: torch.Tensor, expected: torch.Tensor) -> bool:
    if got.shape != expected.shape or not got.is_floating_point():
        return torch.equal(got, expected)
    tolerance = 1000 * torch.finfo(got.dtype).eps * float(expected.abs().max()) if expected.numel() else 0.0
    return torch.allclose(
        got.double(), expected.double(), rtol=0, atol=min(tolerance, 0.05 * (1 + tolerance)), equal_nan=True
    )


def _feeding_call(norm: str, calls: dict[str, list[Call]]) -> Call | None:
    """Return the call of a layer whose output this BatchNorm consumed."""
    for layer_calls in calls.values():
        for call in layer_calls:
            if any(consumer.module == norm for consumer in call.consumers):
                return call
    return None


def _why_not(name: str, norm: Any, layer: Any, feeding: Call | None, calls: dict[str, list[Call]], uses: Any) -> str:
    """Return why the BatchNorm cannot be folded, or nothing."""
    if layer is None or feeding is None or type(layer) not in WEIGHTED:
        return "never called" if not calls[name] else _NO_LAYER
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    if len(calls[name]) != 1 or len(calls[feeding.module]) != 1:
        return "it or its layer is called more than once"
    if len(feeding.consumers) != 1:
        return "the output of its layer is used elsewhere too"
    if any(uses[id(p)] > 1 for module in (layer, norm) for p in module.parameters(recurse=False)):
        return "weights are shared with another module"
    return _why_not_layer(norm, layer, feeding)


def _why_not_layer(norm: Any, layer: Any, feeding: Call) -> str:
    if not isinstance(layer.weight, nn.Parameter):
        return "its layer computes its weights from others"
    if _has_hooks(layer) or _has_hooks(norm):
        return "hooks are registered on it or its layer"
    if type(layer) in TRANSPOSED and layer.groups != 1:
        return "a grouped transposed convolution has no weight axis for its output channels"
    if feeding.output_ndim != layer.weight.ndim:  # 2 for linear layers; convolutions without a batch have one less
        return "dimension 1 does not hold the channels after a linear layer or convolution with other batch dimensions"
    return ""


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _fuse(layer: Any, norm: Any) -> None:
    """Change the layer's weight and bias, in float64 rounded once."""
    fuse: Callable[..., Any] = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
    options = {} if isinstance(layer, nn.Linear) else {"transpose": type(layer) in TRANSPOSED}
    tensors = (layer.weight, layer.bias, norm.running_mean, norm.running_var)
    weight, bias, mean, var = (None if t is None else t.detach().double() for t in tensors)
    gamma = torch.ones_like(norm.running_mean) if norm.weight is None else norm.weight.detach()
    beta = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias.detach()
    weight, bias = fuse(weight, bias, mean, var, norm.eps, gamma.double(), beta.double(), **options)
    layer.weight, layer.bias = (
        nn.Parameter(t.detach().to(layer.weight.dtype), layer.weight.requires_grad) for t in (weight, bias)
    )


def _following_relu(model: nn.Module, layer: nn.Module, layer_calls: list[Call]) -> tuple[str, nn.Module] | None:
    """Return name and module of the ReLU that alone consumes all outputs of a layer; no name for a function."""
    consumers = {consumer for call in layer_calls for consumer in call.consumers}
    if len(consumers) != 1 or any(len(call.consumers) != 1 for call in layer_calls) or _has_hooks(layer):
        return None
    name, function = consumers.pop()
    if name is not None:
        module = model.get_submodule(name)
        return (name, module) if type(module) in RELUS and not _has_hooks(module) else None
    return ("", nn.ReLU().eval()) if function in _RELU_FUNCTIONS else None
