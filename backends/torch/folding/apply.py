"""Apply folds to a model by the names of its modules, without data."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from klquant.errors import InvalidInputError

from ..model.calls import separate_calls
from ..model.edits import replace_module
from ..model.forward import check_eval
from ..model.layers import TRANSPOSED, WEIGHTED, LayerReLU, channel_axis, is_quantizable
from ..model.norms import is_foldable
from ..model.plain import plain_copy
from ..model.products import Product, install

RELU_MODULES = {"relu": nn.ReLU, "relu6": nn.ReLU6}


class Fold(NamedTuple):
    """What happened to one BatchNorm or ReLU: strings only, to write down and apply elsewhere."""

    module: str
    """Qualified name of the BatchNorm or ReLU; of the layer if the ReLU is a function."""
    kind: str
    """`batch_norm`, `relu` or `relu6`."""
    into: str | None
    """Qualified name of the layer that feeds it, or None."""
    reason: str
    """Why it was left alone; empty if it was folded."""

    def __repr__(self) -> str:
        """Return what happened."""
        return f"Fold({self.kind} {self.module}, {self.reason or f'into {self.into}'})"


def apply_folds(
    model: nn.Module,
    folds: Iterable[Fold],
    *,
    products: Iterable[Product] = (),
    calls: Mapping[str, int] | None = None,
) -> nn.Module:
    """Return a copy of the model with these folds applied, without data.

    Parameters
    ----------
    model : torch.nn.Module, in eval mode
        The model that was examined, or one with the same layers. It is not changed.
    folds : iterable of Fold
        ``examine(model, batch).folds``; entries with a reason are skipped.
    products : iterable of Product
        ``examine(model, batch).products``: calls of functions to observe like layers.
    calls : mapping, optional
        ``examine(model, batch).calls``: layers and operands whose calls are observed apart.

    Returns
    -------
    torch.nn.Module
        Folded BatchNorms are identities. A layer that is joined with its ReLU is a :class:`LayerReLU` under its old
        name. The ReLU also stays in its place, where it changes nothing.

    Raises
    ------
    InvalidInputError
        If a module that `folds` names is missing, or of another type or size; if the model is in training mode.
    """
    check_eval(model)
    folded = plain_copy(model)
    fold_in_place(folded, folds)
    install(folded, products)
    separate_calls(folded, calls or {}, {})
    return folded


def fold_in_place(model: nn.Module, folds: Iterable[Fold]) -> None:
    """Do what :func:`apply_folds` does, to the model itself."""
    modules = dict(model.named_modules(remove_duplicate=False))
    todo = [fold for fold in folds if not fold.reason]
    for fold in todo:
        if fold.kind == "batch_norm":
            layer, norm = _checked_norm(fold, modules)
            fuse(layer, norm)
            replace_module(norm, nn.Identity().eval())
    for fold in todo:
        if fold.kind != "batch_norm":
            layer = _checked_relu(fold, modules)
            replace_module(layer, LayerReLU(layer, RELU_MODULES[fold.kind]().eval()))


def fuse(layer: Any, norm: Any) -> None:
    """Change the layer's weight and bias, computed in float64 and rounded once."""
    combine: Callable[..., Any] = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
    options = {} if isinstance(layer, nn.Linear) else {"transpose": isinstance(layer, TRANSPOSED)}
    tensors = (layer.weight, layer.bias, norm.running_mean, norm.running_var)
    weight, bias, mean, var = (None if t is None else t.detach().double() for t in tensors)
    gamma = torch.ones_like(norm.running_mean) if norm.weight is None else norm.weight.detach()
    beta = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias.detach()
    weight, bias = combine(weight, bias, mean, var, norm.eps, gamma.double(), beta.double(), **options)
    layer.weight, layer.bias = (
        nn.Parameter(t.detach().to(layer.weight.dtype), layer.weight.requires_grad) for t in (weight, bias)
    )


def _checked_norm(fold: Fold, modules: dict[str, nn.Module]) -> tuple[Any, Any]:
    layer, norm = _layer(fold, modules), _module(fold.module, modules, "BatchNorm", is_foldable)
    channels = layer.weight.shape[channel_axis(layer)]
    if norm.running_var is None or len(norm.running_var) != channels:
        raise InvalidInputError(
            f"expected a BatchNorm with statistics for the {channels} channels of `{fold.into}`, "
            f"got `{fold.module}`: {norm}"
        )
    return layer, norm


def _checked_relu(fold: Fold, modules: dict[str, nn.Module]) -> Any:
    if fold.kind not in RELU_MODULES:
        raise InvalidInputError(f"`kind` of a fold must be batch_norm, relu or relu6, got {fold.kind!r}")
    if fold.module != fold.into:
        relu = RELU_MODULES[fold.kind]
        _module(fold.module, modules, relu.__name__, lambda module: type(module) is relu)
    return _layer(fold, modules)


def _layer(fold: Fold, modules: dict[str, nn.Module]) -> Any:
    wanted = ", ".join(kind.__name__ for kind in WEIGHTED)
    layer = _module(str(fold.into), modules, wanted, lambda module: isinstance(module, WEIGHTED))
    if not is_quantizable(layer):
        raise InvalidInputError(f"the weight of `{fold.into}` must be a parameter, got one computed from others")
    return layer


def _module(name: str, modules: dict[str, nn.Module], wanted: str, fits: Callable[[nn.Module], bool]) -> Any:
    if name not in modules:
        raise InvalidInputError(f"the folds must be those of this model, which has no module `{name}` ({wanted})")
    if not fits(modules[name]):
        got = type(modules[name]).__name__
        raise InvalidInputError(f"the folds must be those of this model, got a {got} at `{name}`, not one of {wanted}")
    return modules[name]
