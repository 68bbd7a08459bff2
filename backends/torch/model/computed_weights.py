"""Weights that are computed from other parameters, by parametrizations or hooks: constant in eval mode."""

from typing import Any

from torch import nn
from torch.nn.utils import parametrize

_HOOKS = ("WeightNorm", "SpectralNorm")  # of torch.nn.utils, besides those of torch.nn.utils.prune


def fix_weights(module: Any) -> None:
    """Make parameters of tensors that are computed by parametrizations, or by hooks as in weight_norm and prune."""
    if parametrize.is_parametrized(module) and not isinstance(module, nn.RNNBase):
        values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}
        del module._modules["parametrizations"]
        module.__class__ = type(module).__bases__[0]  # its own class, which is that of the user's module too
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    for key, hook in list(module._forward_pre_hooks.items()):
        if _computes_weight(hook):
            hook(module, None)
            _fix_computed(module, getattr(hook, "name", getattr(hook, "_tensor_name", "weight")))
            del module._forward_pre_hooks[key]


def _computes_weight(hook: Any) -> bool:
    kind = type(hook)
    return kind.__module__.startswith("torch.nn.utils.") and (
        kind.__name__ in _HOOKS or any(base.__name__ == "BasePruningMethod" for base in kind.__mro__)
    )


def _fix_computed(module: Any, name: str) -> None:
    value = getattr(module, name).detach().clone()
    for suffix in ("_g", "_v", "_orig"):
        module._parameters.pop(name + suffix, None)
    for suffix in ("_u", "_v", "_mask"):
        module._buffers.pop(name + suffix, None)
    vars(module).pop(name, None)
    module.register_parameter(name, nn.Parameter(value, requires_grad=False))
