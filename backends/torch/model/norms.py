"""Which modules normalize with running statistics, and which of them compute exactly what BatchNorm computes."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.functional import batch_norm

from .layers import BATCH_NORMS

_STATISTICS = ("running_mean", "running_var")
_FROZEN = {"weight", "bias", *_STATISTICS}


def is_foldable(module: nn.Module) -> bool:
    """Return whether a module computes what BatchNorm computes, with the attributes of BatchNorm.

    That holds for subclasses that keep ``forward``, and for FrozenBatchNorm2d: a module with four buffers and nothing
    else, that agrees with BatchNorm on random numbers.
    """
    if "forward" in vars(module):
        return False
    bases = [kind for kind in BATCH_NORMS if isinstance(module, kind)]
    if bases:
        kept = type(module).forward is bases[0].forward and type(module).__call__ is bases[0].__call__
        return kept and not hasattr(module, "parametrizations")
    return _is_frozen(module)


def other_norms(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield name and reason of each module with running statistics that does not compute what BatchNorm computes."""
    for name, module in model.named_modules():
        if _has_statistics(module) and not is_foldable(module):
            yield name, f"{type(module).__name__} has running statistics but is no plain BatchNorm"


def _has_statistics(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return False
    return all(isinstance(module._buffers.get(key), torch.Tensor) for key in _STATISTICS)


def _is_frozen(module: Any) -> bool:
    if not _has_statistics(module) or module._parameters or module._modules:
        return False
    if {*module._buffers} - {"num_batches_tracked"} != _FROZEN or not isinstance(getattr(module, "eps", None), float):
        return False
    hooked = module._forward_hooks or module._forward_pre_hooks
    return not hooked and _agrees_on_random_numbers(module)


def _agrees_on_random_numbers(module: Any) -> bool:
    """Return whether the module scales and shifts as BatchNorm does, and does nothing else such as an activation."""
    mean, var = module.running_mean, module.running_var
    if mean.ndim != 1 or not mean.is_floating_point():
        return False
    mean, var, weight, bias = (t.double() for t in (mean, var, module.weight, module.bias))
    spread = (1e4 * (var + module.eps).sqrt())[:, None, None]  # so large that an activation would show
    x = torch.randn(4, len(mean), 5, 5, generator=torch.Generator().manual_seed(0)).to(mean) * spread
    expected = batch_norm(x, mean, var, weight, bias, eps=module.eps)
    try:
        with torch.no_grad():
            got = copy.deepcopy(module).double()(x.clone())
    except Exception:
        return False
    is_like = isinstance(got, torch.Tensor) and got.dtype == expected.dtype and got.shape == expected.shape
    return is_like and torch.allclose(got, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))
