"""Run a model over calibration data: batches of any form, and hooks that observe its layers."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from klquant.errors import InvalidInputError, KLQuantError, ModelError

from ...settings import Observe
from .advice import advice
from .arguments import arguments_of
from .exported import is_exported
from .hooks import active
from .layers import observed_layers

Forward: TypeAlias = Callable[[nn.Module, Any], Any]
Where: TypeAlias = Observe | Mapping[str, Observe]  # for all layers, or by name for those that are observed
Observer: TypeAlias = Callable[[str, torch.Tensor], None]


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call the model with a tensor, the items of a tuple or list, or the entries of a mapping: those that it takes.

    The tensors are cloned first, because a model may change its input in place and the batch is needed again.
    """
    args, kwargs, _ = tree_map_only(torch.Tensor, torch.clone, tuple(arguments_of(model, batch)))
    return model(*args, **kwargs)


def check_eval(model: nn.Module) -> None:
    """Raise InvalidInputError if any module of the model is in training mode."""
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
    exported = tuple(f"{name}." if name else "" for name, module in model.named_modules() if is_exported(module))
    for name, module in model.named_modules():
        if f"{name}.".startswith(exported) or type(module).__module__.startswith("torch.ao.nn.quantized."):
            continue  # its mode was fixed by torch.export; it computes the same in both
        if getattr(module, "training", False):  # frozen TorchScript has no such attribute
            raise InvalidInputError(
                f"the model must be in eval mode, got {name or 'the model'} in training mode; call model.eval() first"
            )


def observed_at(name: str, observe: Where) -> Observe | None:
    """Return where a layer is observed; None if it is not."""
    place = observe if isinstance(observe, str) else observe.get(name)
    if place not in ("inputs", "outputs", None):
        raise InvalidInputError(f"`observe` must be 'inputs' or 'outputs', got {place!r}")
    return place


def run_observed(
    model: nn.Module,
    batches: Iterable[Any],
    observer: Observer,
    *,
    observe: Where = "inputs",
    forward: Forward = call_model,
    first: int = 0,
) -> int:
    """Run all batches and call ``observer(layer, tensor)`` for every observed tensor; return the number of batches.

    Errors name layer and batch, the first of which has the number `first`: errors of the observer keep their class,
    those of the model become a ModelError.
    """
    number, entered, done = first, "", 0

    def observed(name: str, tensor: Any) -> None:
        nonlocal entered
        entered = f"layer `{name}`, "
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise InvalidInputError(f"{entered}batch {number}: expected a float tensor, got {_kind(tensor)}")
        try:
            observer(name, whole(tensor.detach()))
        except KLQuantError as error:
            raise type(error)(f"{entered}batch {number}: {error}") from error

    with torch.no_grad(), active(_hooks(model, observed, observe)):
        for number, batch in enumerate(batches, start=first):
            try:
                forward(model, batch)
            except KLQuantError:
                raise
            except Exception as error:
                raise _model_error(error, entered, number, batch, (model, forward)) from error
            entered, done = "", done + 1
    return done


def naming_errors(forward: Forward) -> Forward:
    """Return a way to run a model on the first batch whose errors are those of :func:`run_observed`."""

    def run(model: nn.Module, batch: Any) -> Any:
        entered = ""

        def entering(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any) -> None:
                nonlocal entered
                entered = f"layer `{name}`, "

            return hook

        hooks = (layer.register_forward_pre_hook(entering(name)) for name, layer in observed_layers(model))
        try:
            with active(hooks):
                return forward(model, batch)
        except KLQuantError:
            raise
        except Exception as error:
            raise _model_error(error, entered, 0, batch, (model, forward)) from error

    return run


def _model_error(error: Exception, entered: str, number: int, batch: Any, run: tuple[nn.Module, Forward]) -> ModelError:
    model, forward = run
    is_call = not entered and isinstance(error, TypeError)
    hint = advice(model, batch, is_call=is_call) if forward is call_model else ""
    at = f"{entered}batch {number}: the model failed there or later"
    return ModelError(f"{at}, with {type(error).__name__}: {error}{hint}")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor of all samples inside torch.func.vmap, where a model sees one of them."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__


def _hooks(model: nn.Module, observed: Callable[[str, Any], None], observe: Where) -> Iterator[RemovableHandle]:
    for name, layer in observed_layers(model):
        place = observed_at(name, observe)
        if place == "inputs":
            yield layer.register_forward_pre_hook(_on_input(name, observed), with_kwargs=True)
        elif place == "outputs":
            yield layer.register_forward_hook(_on_output(name, observed))


def _on_input(name: str, observed: Callable[[str, Any], None]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        observed(name, args[0] if args else kwargs["input"])

    return hook


def _on_output(name: str, observed: Callable[[str, Any], None]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        observed(name, output)

    return hook
