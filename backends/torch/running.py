"""Run a model over calibration data: batches of any form, progress, hooks that always come off again."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from rich.console import Console
from rich.progress import track
from torch import nn
from torch.utils._pytree import tree_map_only

from klquant.errors import InvalidInputError, KLQuantError

from .layers import weighted_layers

Forward: TypeAlias = Callable[[nn.Module, Any], Any]
Observe: TypeAlias = Literal["inputs", "outputs"]


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call the model with a tensor, with the items of a tuple or list, or with the entries of a mapping by name.

    The tensors are copied first: a model may change its input in place, and the batch is needed again.
    """
    batch = tree_map_only(torch.Tensor, torch.clone, batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def copy_model(model: nn.Module) -> nn.Module:
    """Return a deep copy, or say why there is none."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise InvalidInputError(f"the model must allow copy.deepcopy, got: {error}") from error


def check_observe(observe: str) -> None:
    """Refuse all but the two places."""
    if observe not in ("inputs", "outputs"):
        raise InvalidInputError(f"`observe` must be 'inputs' or 'outputs', got {observe!r}")


def check_eval(model: nn.Module) -> None:
    """Refuse a model of which any part is in training mode."""
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if module.training:
            raise InvalidInputError(
                f"the model must be in eval mode, got {name or 'the model'} in training mode; call model.eval() first"
            )


def run_observed(
    model: nn.Module,
    batches: Iterable[Any],
    observer: Callable[[str, torch.Tensor], None],
    *,
    observe: Observe = "inputs",
    forward: Forward = call_model,
    progress: str = "",
) -> None:
    """Run all batches and call ``observer(layer, tensor)`` for every observed tensor, with float tensors only.

    An error of the observer is raised again with the names of layer and batch.
    """
    check_eval(model)
    check_observe(observe)
    number = -1

    def observed(name: str, tensor: Any) -> None:
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise InvalidInputError(f"layer `{name}`, batch {number}: expected a float tensor, got {_kind(tensor)}")
        try:
            observer(name, tensor.detach())
        except KLQuantError as error:
            raise type(error)(f"layer `{name}`, batch {number}: {error}") from error

    with torch.no_grad(), _hooks(model, observed, observe):
        for number, batch in enumerate(_tracked(batches, progress)):  # noqa: B007 the observer reads it
            forward(model, batch)
    if number < 0:
        raise InvalidInputError("expected at least one calibration batch, got none")


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__


def _tracked(batches: Iterable[Any], description: str) -> Iterable[Any]:
    console = Console(stderr=True)
    return track(batches, description, console=console, disable=not (description and console.is_terminal))


@contextmanager
def _hooks(model: nn.Module, observed: Callable[[str, Any], None], observe: Observe) -> Iterator[None]:
    handles = []
    try:
        for name, layer in weighted_layers(model):
            if observe == "inputs":
                handles.append(layer.register_forward_pre_hook(_on_input(name, observed), with_kwargs=True))
            else:
                handles.append(layer.register_forward_hook(_on_output(name, observed)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _on_input(name: str, observed: Callable[[str, Any], None]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        observed(name, args[0] if args else kwargs["input"])

    return hook


def _on_output(name: str, observed: Callable[[str, Any], None]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        observed(name, output)

    return hook
