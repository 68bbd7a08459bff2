"""What to say when a model fails on a batch of a loader: what the batch is, and a line to write, which was tried."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from .arguments import arguments_of, describe, has_optional_items
from .dataflow import tensors_in

_MOST = 8  # items of a list that are tried alone


class _Argument(NamedTuple):
    name: str
    """Empty for an argument by position."""
    value: Any
    code: str
    """How to write it."""
    reasons: tuple[str, ...] = ()
    """Why the model cannot take it as it is in the batch."""


def advice(model: Any, batch: Any, *, is_call: bool) -> str:
    """Return what a batch is and the `forward` to pass, to end an error message; empty if the batch looks right.

    Parameters
    ----------
    model : torch.nn.Module
        It is run to find a call that works.
    batch
        What the model failed on.
    is_call : bool
        Whether the call itself failed, before any layer.
    """
    call = _first_that_works(model, batch)
    if not call and not is_call and not has_optional_items(model, batch):
        return ""
    reasons = ", ".join(dict.fromkeys(reason for one in call for reason in one.reasons))
    given = ", ".join(f"{one.name}={one.code}" if one.name else one.code for one in call)
    line = f"model({given})" if call else "..."
    what = f" ({reasons})" if reasons else ""
    return f"; batches are {describe(batch)}{what}; pass forward=lambda model, batch: {line}"


def _first_that_works(model: Any, batch: Any) -> list[_Argument]:
    """Return the first call that the model takes, if possible without conversions; empty if it takes none."""
    calls = [call for call in _calls(model, batch) if call and _is_possible(model, call)]
    failed = arguments_of(model, batch)
    others = [call for call in calls if _identity(*_given(call)) != _identity(failed.args, failed.kwargs)]
    converted = ([_converted(model, one) for one in call] for call in calls)
    changed = (call for call in converted if any(one.reasons for one in call))
    return next((call for group in (others, changed) for call in group if _works(model, call)), [])


def _calls(model: Any, batch: Any) -> Iterator[list[_Argument]]:
    """Yield what a model may be called with; what uses more of the batch comes first."""
    whole = _Argument("", batch, "batch")
    items = _items(whole)
    yield [whole]
    yield from _several(model, items)
    for one in sorted(items, key=lambda one: -getattr(one.value, "ndim", 0)):
        yield [one._replace(name="")]
    for one in items:
        yield from _several(model, _items(one))


def _several(model: Any, items: list[_Argument]) -> Iterator[list[_Argument]]:
    """Yield the items that `forward` names, all, and the first ones of a list."""
    names = inspect.signature(model.forward).parameters
    yield [one for one in items if one.name in names]
    yield items
    yield from (items[:number] for number in range(len(items) - 1, 1, -1) if not items[0].name)


def _items(holder: _Argument) -> list[_Argument]:
    """Return what a mapping, a dataclass, a list or a tuple holds."""
    value, code = holder.value, holder.code
    if isinstance(value, Mapping):
        return [_Argument(str(key), item, f"{code}[{key!r}]") for key, item in value.items()]
    if is_dataclass(value):
        return [_Argument(key, item, f"{code}.{key}") for key, item in vars(value).items()]
    if isinstance(value, (list, tuple)):
        return [_Argument("", item, f"{code}[{number}]") for number, item in enumerate(value[:_MOST])]
    return []


def _given(call: list[_Argument]) -> tuple[list[Any], dict[str, Any]]:
    return [one.value for one in call if not one.name], {one.name: one.value for one in call if one.name}


def _identity(args: Any, kwargs: dict[str, Any]) -> Any:
    return [*map(id, args)], {name: id(value) for name, value in kwargs.items()}


def _is_possible(model: Any, call: list[_Argument]) -> bool:
    args, kwargs = _given(call)
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _works(model: Any, call: list[_Argument]) -> bool:
    try:
        args, kwargs = tree_map_only(torch.Tensor, torch.clone, _given(call))
        return any(True for _ in tensors_in(model(*args, **kwargs)))
    except Exception:
        return False


def _converted(model: Any, one: _Argument) -> _Argument:
    """Return an argument in the form, dtype and place that the model takes."""
    value, code, reasons = one.value, one.code, [*one.reasons]
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        reasons.append("NumPy arrays")
        value, code = torch.from_numpy(np.ascontiguousarray(value)), f"torch.from_numpy({code})"
    if not isinstance(value, torch.Tensor):
        return one
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is not None and value.ndim == 3:
        reasons.append("no batch dimension")
        value, code = value[None], f"{code}[None]"
    if first is not None and value.ndim == 4 and value.shape[3] == first.in_channels != value.shape[1]:
        reasons.append("channels last, NHWC")
        value, code = value.permute(0, 3, 1, 2), f"{code}.permute(0, 3, 1, 2)"
    return _with_dtype(model, _Argument(one.name, value, code, tuple(reasons)))


def _with_dtype(model: Any, one: _Argument) -> _Argument:
    """Return a tensor in the dtype and on the device of the weights."""
    value, code, reasons = one.value, one.code, [*one.reasons]
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    wanted = torch.float32 if weight is None else weight.dtype
    if value.dtype == torch.uint8:
        reasons.append("uint8")
        code += ".float() / 255" if wanted == torch.float32 else f".to({wanted}) / 255"
        value = value.to(wanted) / 255
    elif value.is_floating_point() and value.dtype != wanted:
        reasons.append(f"{value.dtype}, where the weights are {wanted}")
        value, code = value.to(wanted), f"{code}.to({wanted})"
    if weight is not None and value.device != weight.device:
        reasons.append(f"on {value.device}, where the model is on {weight.device}")
        value, code = value.to(weight.device), f"({code})" if " / " in code else code
        code += f".to('{weight.device}')"
    return _Argument(one.name, value, code, tuple(reasons))
