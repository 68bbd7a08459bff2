"""Turn modules that compute what a plain layer computes into that layer, in a copy of the model.

A weight that is computed from other parameters is constant in eval mode, so it is computed once. Subclasses with their
own ``forward`` are run on random numbers: if the result is that of a plain layer, they are replaced by it.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from klquant.errors import InvalidInputError

from .attention import Attention, is_plain_attention
from .computed_weights import fix_weights
from .edits import copy_model, replace_module, without_nested_tensors
from .exported import make_layers
from .layers import BATCH_NORMS, WEIGHTED, SameConv2d, keeps_forward
from .norms import is_frozen, norm_of_frozen

LayerTypes: TypeAlias = Mapping[type[nn.Module], Callable[[Any], nn.Module]]
_SIZES = (7, 12)  # of random images: padding that depends on the size must show
_SCALES = (0.01, 1, 100)  # of random numbers: an activation must show, and a branch that large or small ones take


class NormActivation(nn.Module):
    """A BatchNorm, and what follows it in the module that this replaces, as separate modules."""

    def __init__(self, norm: nn.Module, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.norm = norm
        for name, part in parts.items():
            self.add_module(name, part)
        self.eval()

    def __getattr__(self, name: str) -> Any:
        """Return the attribute of the BatchNorm if this has none, since models read them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("norm"), name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize, then apply the other parts in their order."""
        for part in self._modules.values():
            x = part(x)  # type: ignore[misc]
        return x


def plain_copy(model: nn.Module, layer_types: LayerTypes | None = None) -> nn.Module:
    """Return a copy of a model with plain layers; see :func:`make_plain`."""
    copied = without_nested_tensors(copy_model(model))
    make_layers(copied)
    return make_plain(copied, layer_types)


def make_plain(model: nn.Module, layer_types: LayerTypes | None = None) -> nn.Module:
    """Replace, in a model that the caller owns, modules by plain layers where that changes nothing; return it.

    Parameters
    ----------
    model : torch.nn.Module, in eval mode
    layer_types : mapping of classes to functions, optional
        A function takes a module of its class and returns the module that takes its place, such as an `nn.Conv2d`.
    """
    with torch.no_grad():
        for module in _modules(model):
            fix_weights(module)
        for name, module in dict(model.named_modules()).items():
            new = _given(name, module, layer_types or {}) or _found(module)
            if new is not None:
                replace_module(module, new.eval())
    return model


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in list(model.modules()) if not isinstance(module, torch.jit.ScriptModule))


def _given(name: str, module: nn.Module, layer_types: LayerTypes) -> nn.Module | None:
    convert = layer_types.get(type(module))
    if convert is None:
        return None
    new = convert(module)
    if not isinstance(new, nn.Module):
        raise InvalidInputError(
            f"`layer_types` must return a module for `{name}` ({type(module).__name__}), got {type(new).__name__}"
        )
    return new


def _found(module: Any) -> nn.Module | None:
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return None
    if is_plain_attention(module):
        return Attention(module)
    if isinstance(module, WEIGHTED) and not keeps_forward(module) and "weight" not in module._buffers:
        return _plain_layer(module)
    if isinstance(module, BATCH_NORMS) and module._modules and module.running_mean is not None:
        return _split_norm(module)
    if is_frozen(module):
        return norm_of_frozen(module)
    return _linear_of_conv1d(module) if type(module).__name__ == "Conv1D" else None


class _Products(TorchFunctionMode):
    """Keeps the arguments of convolutions and linear maps."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, torch.Tensor, torch.Tensor | None]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("conv1d", "conv2d", "conv3d", "linear"):
            names = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
            self.calls.append((name, names["weight"], names.get("bias")))
        return func(*args, **(kwargs or {}))


def _plain_layer(module: Any) -> nn.Module | None:
    """Return the plain layer that computes the same as a subclass, judged by random numbers; None if none does."""
    samples = _samples(module)
    if not samples or not _takes_one_tensor(module):
        return None
    try:
        with _Products() as seen:
            expected = [module(x.clone()) for x in samples]
    except Exception:
        return None
    if len(seen.calls) != len(samples):
        return None
    _, weight, bias = seen.calls[0]
    for kind in (_plain_class(module), SameConv2d):
        layer = _with_weights(module, kind, weight, bias)
        if layer is not None and _agree(layer, samples, expected):
            return layer
    return None


def _takes_one_tensor(module: nn.Module) -> bool:
    """Return whether ``forward`` has one parameter: what the others do, a run without them does not show."""
    parameters = inspect.signature(module.forward).parameters.values()
    return sum(one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in parameters) <= 1


def _plain_class(module: nn.Module) -> type[nn.Module]:
    return next(kind for kind in WEIGHTED if isinstance(module, kind))


def _samples(module: Any) -> list[torch.Tensor]:
    """Return random inputs of several sizes and scales."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(module, nn.Linear):
        shapes: list[tuple[int, ...]] = [(3, module.in_features), (2, 4, module.in_features)]
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        rank, reach = (
            len(module.kernel_size),
            max(k * d for k, d in zip(module.kernel_size, module.dilation, strict=True)),
        )
        shapes = [(2, module.in_channels, *(size + reach + k for k in range(rank))) for size in _SIZES]
    else:
        return []
    like = next(module.parameters())
    return [torch.randn(shape, generator=generator).to(like) * scale for shape in shapes for scale in _SCALES]


def _with_weights(module: Any, kind: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module | None:
    if kind is SameConv2d and not isinstance(module, nn.Conv2d):
        return None
    layer: Any = copy.copy(module)
    layer.__class__ = kind
    layer._modules, layer._buffers = {}, {}
    layer._parameters = {
        name: None if value is None else value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach())
        for name, value in (("weight", weight), ("bias", bias))
    }
    return layer  # type: ignore[no-any-return]


def _agree(layer: nn.Module, samples: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    try:
        return all(_same(layer(x.clone()), y) for x, y in zip(samples, expected, strict=True))
    except Exception:
        return False


def _same(got: Any, expected: Any) -> bool:
    if not isinstance(got, torch.Tensor) or not isinstance(expected, torch.Tensor) or got.dtype != expected.dtype:
        return False
    if got.shape != expected.shape or not expected.isfinite().all():
        return False
    tolerance = 100 * torch.finfo(got.dtype).eps * float(expected.abs().max())
    return float((got - expected).abs().max()) <= tolerance


def _split_norm(module: Any) -> nn.Module | None:
    """Return BatchNorm and activation apart, if the module is a BatchNorm followed by its children."""
    kind = next(kind for kind in BATCH_NORMS if isinstance(module, kind))
    norm = copy.copy(module)
    norm.__class__, norm._modules = kind, {}
    split = NormActivation(norm, module._modules)
    rank = 1 if kind is nn.BatchNorm1d else 3 if kind is nn.BatchNorm3d else 2
    generator = torch.Generator().manual_seed(0)
    spread = 10 * (module.running_var + module.eps).sqrt()
    x = torch.randn(2, *(5,) * rank, len(spread), generator=generator).to(spread) * spread
    samples = [x.movedim(-1, 1).contiguous()]
    try:
        expected = [module(samples[0].clone())]
    except Exception:
        return None
    return split if _agree(split, samples, expected) else None


def _linear_of_conv1d(module: Any) -> nn.Module | None:
    """Return the linear layer that transformers' Conv1D is, with its weight the other way round."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None or weight.ndim != 2:
        return None
    layer: Any = nn.Linear(weight.shape[0], weight.shape[1], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().T.contiguous(), weight.requires_grad)
    layer.bias = bias
    samples = [torch.randn(3, 2, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)]
    try:
        expected = [module(samples[0])]
    except Exception:
        return None
    return layer if _agree(layer, samples, expected) else None
