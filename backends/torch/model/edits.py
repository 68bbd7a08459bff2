"""Copy a model, and change the modules of a copy in place."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from klquant.errors import InvalidInputError


def copy_model(model: nn.Module) -> nn.Module:
    """Return a deep copy; raise InvalidInputError, with the reason, if the model does not allow one."""
    try:
        copied = copy.deepcopy(model, _computed_tensors(model) or None)
    except Exception as error:
        raise InvalidInputError(f"the model must allow copy.deepcopy, got: {error}") from error
    for module in copied.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # cuDNN wants its weights in one block of memory; a copy has several
    return copied


def _computed_tensors(model: nn.Module) -> dict[int, torch.Tensor]:
    """Return copies of the tensors that hooks such as those of weight_norm computed, which deepcopy refuses, by id."""
    found: dict[int, torch.Tensor] = {}
    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            own = (value for value in vars(module).values() if isinstance(value, torch.Tensor))
            found |= {id(value): value.detach().clone() for value in own if not value.is_leaf}
    return found


def replace_module(old: nn.Module, new: nn.Module) -> None:
    """Turn the object `old` into `new`, which may wrap it.

    A module may be registered under several names, held in plain lists, or be the model itself, so it is not enough to
    set an attribute of one parent. Instead the object takes over class and attributes of `new`: every holder of it now
    holds the new module. If `new` wraps `old`, it would then contain itself; so inside it `old` is replaced by another
    object that takes over the original class and attributes.
    """
    inner = object.__new__(type(old))
    inner.__dict__ = old.__dict__
    for parent in new.modules():
        parent._modules.update({name: inner for name, child in parent._modules.items() if child is old})
    old.__class__ = type(new)
    old.__dict__ = new.__dict__


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Undo, at the end of the block, what it does to the modules of the model: their classes, attributes and buffers.

    So changes can be tried on a model without another copy of it, and every run in such a block starts from the same
    buffers. Parameters come back as the objects that they were: replace them in the block, and do not write to them.
    Lists and dicts that a model fills while it runs are not emptied.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):  # holds its attributes outside Python
                stack.callback(_restorer(module))
        for buffer in model.buffers():
            version = None if buffer.is_inference() else buffer._version  # these do not count their changes
            stack.callback(_restore_values, buffer, buffer.detach().clone(), version)
        yield


def _restorer(module: nn.Module) -> Callable[[], None]:
    kind, attributes = type(module), module.__dict__
    registered = [attributes[key] for key in ("_parameters", "_buffers", "_modules")]
    before = [(content, dict(content)) for content in (attributes, *registered)]

    def restore() -> None:
        if type(module) is not kind:
            module.__class__, module.__dict__ = kind, attributes
        for content, kept in before:
            content.clear()
            content.update(kept)

    return restore


def _restore_values(buffer: torch.Tensor, values: torch.Tensor, version: int | None) -> None:
    if version is None or buffer._version != version:
        with torch.no_grad():
            buffer.copy_(values)


def without_nested_tensors(model: nn.Module) -> nn.Module:
    """Make the encoder of a transformer take its slow path, in which layers see ordinary tensors; return the model."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # otherwise a padding mask makes it pack the batch
    return model
