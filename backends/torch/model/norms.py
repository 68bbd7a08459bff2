"""Which modules normalize with running statistics, and which of them compute exactly what BatchNorm computes."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.functional import batch_norm

from .layers import BATCH_NORMS

_STATISTICS = ("running_mean", "running_var")
_FROZEN = {"weight", "bias", *_STATISTICS}


def is_foldable(module: nn.Module) -> bool:
    """Return whether a module is a BatchNorm, or a subclass that keeps ``forward``."""
    bases = [kind for kind in BATCH_NORMS if isinstance(module, kind)]
    if not bases or "forward" in vars(module):
        return False
    kept = type(module).forward is bases[0].forward and type(module).__call__ is bases[0].__call__
    return kept and not hasattr(module, "parametrizations")


def other_norms(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield name and reason of each module with running statistics that does not compute what BatchNorm computes."""
    for name, module in model.named_modules():
        if _has_statistics(module) and not is_foldable(module):
            yield name, f"{type(module).__name__} has running statistics but is no plain BatchNorm"


def _has_statistics(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return False
    return all(isinstance(module._buffers.get(key), torch.Tensor) for key in _STATISTICS)


def is_frozen(module: nn.Module) -> bool:
    """Return whether a module has the statistics, weight and bias of BatchNorm as buffers, and nothing else."""
    if not _has_statistics(module) or module._parameters or module._modules:
        return False
    return {*module._buffers} - {"num_batches_tracked"} == _FROZEN


def norm_of_frozen(module: Any) -> nn.BatchNorm2d | None:
    """Return the BatchNorm that a frozen one is, judged by random numbers; None if it computes something else.

    eps comes from the numbers too: some frozen norms keep it to themselves.
    """
    mean, var = module.running_mean, module.running_var
    if mean.ndim != 1 or not mean.is_floating_point():
        return None
    wide = copy.deepcopy(module).double()
    mean, var, weight, bias = (t.double() for t in (mean, var, module.weight, module.bias))
    spread = (1e4 * (var + 1e-3).sqrt())[:, None, None]  # so large that an activation would show
    x = torch.randn(4, len(mean), 5, 5, generator=torch.Generator().manual_seed(0)).to(mean) * spread
    try:
        eps = _fitted_eps(wide, weight, var)
        got = wide(x.clone())
    except Exception:
        return None
    expected = batch_norm(x, mean, var, weight, bias, eps=eps)
    return _filled(module, eps) if _is_close(got, expected) else None


def _fitted_eps(norm: nn.Module, weight: torch.Tensor, var: torch.Tensor) -> float:
    """Return eps from the slope of the channel where it counts most."""
    channel = int(torch.where(weight == 0, math.inf, var).argmin())
    ends = norm(torch.tensor([0.0, 1.0]).to(var)[:, None, None, None].expand(2, len(var), 1, 1).clone())
    slope = ends[1, channel] - ends[0, channel]
    return float(f"{float((weight[channel] / slope) ** 2 - var[channel]):.4g}")


def _is_close(got: Any, expected: torch.Tensor) -> bool:
    is_like = isinstance(got, torch.Tensor) and got.dtype == expected.dtype and got.shape == expected.shape
    return is_like and torch.allclose(got, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))


def _filled(frozen: Any, eps: float) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(len(frozen.weight), eps).to(frozen.weight)
    norm.load_state_dict(frozen.state_dict(), strict=False)
    return norm.requires_grad_(requires_grad=False)
