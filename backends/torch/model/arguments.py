"""How a batch becomes the arguments of a model: also of (image, label) pairs, and of dicts with more than it takes."""

import contextlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter
from typing import Any, NamedTuple

import torch

from klquant.errors import InvalidInputError

from .layers import LayerWrapper

logger = logging.getLogger("klquant")
_BY_POSITION = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


class Arguments(NamedTuple):
    """What a model is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    left_out: tuple[str, ...] = ()
    """What the model does not take: names, or numbers of items."""


def arguments_of(model: Any, batch: Any) -> Arguments:
    """Return the arguments of a model: a tensor alone, the items of a tuple or list, or the entries of a mapping.

    Items that the model does not take are left out where that is unambiguous: entries of a mapping with names that
    ``forward`` lacks, and labels after the inputs. Otherwise all are passed, and the call fails.
    """
    parameters = _parameters(model)
    if isinstance(batch, Mapping):
        return _by_name(parameters, dict(batch))
    if not isinstance(batch, (tuple, list)):
        return Arguments((batch,), {})
    return _by_position(parameters, tuple(batch))


class _Called(Exception):  # noqa: N818 no error: it ends a run when its purpose is fulfilled
    pass


def arguments_of_call(model: torch.nn.Module, batch: Any, forward: Callable[[Any, Any], Any]) -> Arguments:
    """Return the arguments of the first call of the model in a `forward`, without running the model."""
    found: list[Arguments] = []

    def entering(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        found.append(Arguments(args, kwargs))
        raise _Called

    with contextlib.suppress(_Called), torch.no_grad(), model.register_forward_pre_hook(entering, with_kwargs=True):
        forward(model, batch)
    if not found:
        raise InvalidInputError("`forward` must call the model itself, got one that does not: its inputs are unknown")
    return found[0]


def log_left_out(model: Any, batch: Any) -> None:
    """Log which items of a batch the model does not take."""
    if left_out := arguments_of(model, batch).left_out:
        logger.info("%s: the model does not take %s, which is left out", describe(batch), ", ".join(left_out))


def has_optional_items(model: Any, batch: Any) -> bool:
    """Return whether items of a tuple or list take the places of optional arguments, as labels do by accident."""
    if not isinstance(batch, (tuple, list)):
        return False
    places = [one for one in _parameters(model) if one.kind in _BY_POSITION]
    return any(one.default is not Parameter.empty for one in places[: len(batch)])


def describe(value: Any) -> str:
    """Return a batch in short, such as ``(Tensor[64,3,48,48], Tensor[64])``."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        shown = ", ".join(map(describe, value[:8])) + (", ..." if len(value) > 8 else "")
        return f"[{shown}]" if isinstance(value, list) else f"({shown})"
    shape = getattr(value, "shape", None)
    sizes = "" if shape is None else f"[{','.join(map(str, shape))}]"
    return f"{type(value).__name__}{sizes}"


def main_item(items: Sequence[Any]) -> int | None:
    """Return the number of the only item with the most dimensions, two or more: the input beside labels."""
    ranks = [getattr(item, "ndim", 0) for item in items]
    most = max(ranks, default=0)
    return ranks.index(most) if most >= 2 and ranks.count(most) == 1 else None


def _parameters(model: Any) -> list[Parameter]:
    while isinstance(model, LayerWrapper):
        model = model.layer
    try:
        return list(inspect.signature(getattr(model, "forward", model)).parameters.values())
    except (TypeError, ValueError):
        return [Parameter("args", Parameter.VAR_POSITIONAL), Parameter("kwargs", Parameter.VAR_KEYWORD)]


def _by_name(parameters: list[Parameter], entries: dict[str, Any]) -> Arguments:
    named = {one.name for one in parameters if one.kind in (_BY_POSITION[1], Parameter.KEYWORD_ONLY)}
    if any(one.kind is Parameter.VAR_KEYWORD for one in parameters) or entries.keys() <= named:
        return Arguments((), entries)
    required = _required(parameters)
    known = {key: value for key, value in entries.items() if key in named}
    if known and required <= known.keys():
        return Arguments((), known, tuple(f"`{key}`" for key in entries if key not in known))
    main = main_item(list(entries.values()))
    if len(required) == 1 and not known and main is not None:
        left_out = tuple(f"`{key}`" for number, key in enumerate(entries) if number != main)
        return Arguments((list(entries.values())[main],), {}, left_out)
    return Arguments((), entries)


def _by_position(parameters: list[Parameter], items: tuple[Any, ...]) -> Arguments:
    everything = Arguments(items, {})
    if any(one.kind is Parameter.VAR_POSITIONAL for one in parameters) or len(items) < 2:
        return everything
    if isinstance(items[0], Mapping):  # (inputs, labels)
        inner = _by_name(parameters, dict(items[0]))
        return inner._replace(left_out=_numbers(1, items)) if _has_known_names(parameters, items[0]) else everything
    places = [one for one in parameters if one.kind in _BY_POSITION]
    taken = next((k for k, item in enumerate(items) if k >= len(places) or not _fits(item, places[k])), len(items))
    required = sum(one.default is Parameter.empty for one in places)
    ranks = [getattr(item, "ndim", 0) for item in items]
    is_clear = taken == required and min(ranks[:taken], default=0) > max(ranks[taken:], default=0)
    return Arguments(items[:taken], {}, _numbers(taken, items)) if is_clear else everything


def _has_known_names(parameters: list[Parameter], entries: Mapping[str, Any]) -> bool:
    return bool(entries) and {*entries} <= {one.name for one in parameters}


def _fits(item: Any, parameter: Parameter) -> bool:
    """Return False for a tensor in the place of a flag or number, and for labels in the place of an optional mask."""
    if parameter.default is Parameter.empty or not isinstance(item, torch.Tensor):
        return True
    is_constant = isinstance(parameter.default, (bool, str, int, float))
    return not is_constant and not ("mask" in parameter.name and item.ndim < 2)


def _numbers(first: int, items: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(f"item {number}" for number in range(first, len(items)))


def _required(parameters: list[Parameter]) -> set[str]:
    return {one.name for one in parameters if one.default is Parameter.empty and one.kind is not Parameter.VAR_KEYWORD}
