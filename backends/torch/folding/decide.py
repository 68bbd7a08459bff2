"""Decide from a recording which BatchNorms and ReLUs can be folded, and give the reasons for the others."""

from collections import Counter
from typing import Any

from torch import nn

from ..model.dataflow import Call, Recording, count_uses
from ..model.layers import RELUS, TRANSPOSED, WEIGHTED, LayerReLU, is_quantizable, weighted_layers
from ..model.norms import is_foldable, other_norms
from .apply import RELU_MODULES, Fold

_NO_LAYER = "no convolution or linear layer feeds it directly"


def all_folds(model: nn.Module, seen: Recording) -> list[Fold]:
    """Return a fold for each BatchNorm, then one for each ReLU that can be joined with its layer."""
    norms = norm_folds(model, seen)
    return norms + relu_folds(model, seen, norms)


def norm_folds(model: nn.Module, seen: Recording) -> list[Fold]:
    """Return a fold for each BatchNorm, with a reason if it must be left alone."""
    uses = count_uses(model)
    folds = []
    for name, norm in model.named_modules():
        if is_foldable(norm):
            feeding = _feeding_call(name, seen)
            layer = model.get_submodule(feeding.module) if feeding else None
            reason = _norm_obstacle(name, norm, layer, feeding, seen, uses)
            into = feeding.module if feeding and not isinstance(layer, RELUS) else None
            folds.append(Fold(name, "batch_norm", into, reason))
    return folds + [Fold(name, "batch_norm", None, reason) for name, reason in other_norms(model)]


def relu_folds(model: nn.Module, seen: Recording, norms: list[Fold] | None = None) -> list[Fold]:
    """Return a fold for each layer that can be joined with its ReLU after the `norms` are folded."""
    last = {fold.into: fold.module for fold in norms or [] if not fold.reason}
    folds = []
    for name, layer in weighted_layers(model):
        relu = _following_relu(model, seen.calls.get(last.get(name, name), []))
        if relu and not isinstance(layer, LayerReLU) and not has_hooks(layer):
            folds.append(Fold(relu[0] or name, relu[1], name, reason=""))
    return folds


def has_hooks(module: nn.Module) -> bool:
    """Return whether the module has hooks, which may change its input or output."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _feeding_call(norm: str, seen: Recording) -> Call | None:
    """Return the call whose output this BatchNorm consumed."""
    for calls in seen.calls.values():
        for call in calls:
            if any(consumer.module == norm for consumer in call.consumers):
                return call
    return None


def _norm_obstacle(name: str, norm: Any, layer: Any, feeding: Call | None, seen: Recording, uses: Counter[int]) -> str:
    """Return why the BatchNorm cannot be folded; empty if it can."""
    if layer is None or feeding is None or not isinstance(layer, WEIGHTED):
        return "never called" if not seen.calls[name] else _NO_LAYER
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    if len(seen.calls[name]) != 1 or len(seen.calls[feeding.module]) != 1:
        return "it or its layer is called more than once"
    if len(feeding.consumers) != 1:
        return "the output of its layer is used elsewhere too"
    return _weights_obstacle(name, norm, feeding.module, layer, seen, uses) or _layer_obstacle(norm, layer, feeding)


def _weights_obstacle(name: str, norm: Any, into: str, layer: Any, seen: Recording, uses: Counter[int]) -> str:
    if not is_quantizable(layer):
        return "the weights of its layer are computed from other parameters"
    if any(uses[id(p)] > 1 for module in (layer, norm) for p in module.parameters(recurse=False)):
        return "weights are shared with another module"
    return "weights are used elsewhere too" if {name, into} & seen.read else ""


def _layer_obstacle(norm: Any, layer: Any, feeding: Call) -> str:
    if has_hooks(layer) or has_hooks(norm):
        return "hooks are registered on it or its layer"
    if isinstance(layer, TRANSPOSED) and layer.groups != 1:
        return "a grouped transposed convolution has no weight axis for its output channels"
    if feeding.output_ndim != layer.weight.ndim:  # 2 for linear layers; without a batch convolutions have one less
        return "dimension 1 does not hold the channels after a linear layer or convolution with other batch dimensions"
    return ""


def _following_relu(model: nn.Module, calls: list[Call]) -> tuple[str, str] | None:
    """Return name and kind of the ReLU that is the only consumer of all calls; a function has no name."""
    consumers = {consumer for call in calls for consumer in call.consumers}
    if len(consumers) != 1 or any(len(call.consumers) != 1 for call in calls):
        return None
    name, _, kind = consumers.pop()
    if name is None:
        return ("", kind) if kind else None
    module = model.get_submodule(name)
    kinds = [kind for kind, relu in RELU_MODULES.items() if type(module) is relu]
    return (name, kinds[0]) if kinds and not has_hooks(module) else None
