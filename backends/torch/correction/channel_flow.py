"""Find pairs of layers between which channels can be scaled: everything between commutes with positive factors.

If f(s x) = s f(x) for every s > 0 (ReLU, pooling, Flatten, ...), then dividing the output channels of one layer by s
and multiplying the input channels of the next by s changes nothing. As in :mod:`..model.dataflow`, one run of the model
shows what feeds what. The tensors that a layer returns are followed by identity through every function that commutes,
whether a module calls it or not: each step hands the chain on to the function's result. Anything else ends the chain
with a reason: a function that does not commute, a second use (its other branch would see the scaled values), leaving
the model. A tensor that is followed is kept alive, because Python may give its id to another one afterwards.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from ..model.dataflow import record_calls, tensors_in
from ..model.functions import METADATA
from ..model.hooks import active
from ..model.layers import LayerReLU, inner_layer, weighted_layers

# by name, which is the same for a module's function f, torch.f and Tensor.f
_ELEMENTWISE = {"relu", "relu_", "leaky_relu", "leaky_relu_", "dropout", "dropout1d", "dropout2d", "dropout3d"}
_POOLS = {f"{kind}_pool{rank}d": rank for kind in ("max", "avg", "adaptive_max", "adaptive_avg") for rank in (1, 2, 3)}
_FLATTENING = {"flatten", "view", "reshape"}
_TWICE = "its output is used more than once"


@dataclass
class Chain:
    """Where the output of one call of a layer went."""

    first: str
    second: str | None = None
    """The layer that it entered, if it did."""
    positions: int = 1
    """How many adjacent inputs of `second` come from one channel of `first`: more than one after Flatten."""
    reason: str = ""
    """Why the channels must not be scaled; empty if they may be."""


@dataclass
class _Tensor:
    """A tensor that is followed."""

    value: torch.Tensor
    chain: Chain
    axis: int  # of the channels
    is_used: bool = False


def follow_chains(model: nn.Module, run: Callable[[], Any]) -> tuple[list[Chain], set[int], list[torch.Tensor]]:
    """Run the model; return a chain for each call of a layer, in order.

    Also return the ids of all tensors that were used outside the layers, and the tensors that the model returned.
    """
    tracer = _Tracer()

    def hooks() -> Iterator[RemovableHandle]:
        for name, layer in weighted_layers(model):
            yield layer.register_forward_pre_hook(tracer.entering(name, layer), with_kwargs=True)
            yield layer.register_forward_hook(tracer.leaving(name, layer), always_call=True)

    def traced() -> None:
        with tracer:
            run()

    with active(hooks()):
        output = record_calls(model, traced).output
    tracer.end(output)
    return tracer.chains, tracer.used, output


class _Tracer(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.chains: list[Chain] = []
        self.used: set[int] = set()
        self._depth = 0  # of layers: nothing is followed inside them
        self._tensors: dict[int, _Tensor] = {}

    def end(self, output: list[torch.Tensor]) -> None:
        for tensor in self._use(output):
            tensor.chain.reason = tensor.chain.reason or "the model returns its output"
        for chain in self.chains:
            if chain.second is None:
                chain.reason = chain.reason or "its output is not used"

    def entering(self, name: str, layer: nn.Module) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            for tensor in self._use(tensors_in((args, kwargs))):
                _arrive(tensor, name, inner_layer(layer))
            self._depth += 1

        return hook

    def leaving(self, name: str, layer: nn.Module) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._depth -= 1
            if isinstance(output, torch.Tensor):  # it is None if the module raised an error
                chain = Chain(name, reason=_relu_obstacle(layer))
                self.chains.append(chain)
                self._tensors[id(output)] = _Tensor(output, chain, _axis(inner_layer(layer), output.ndim))

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = _name(func), kwargs or {}
        if self._depth or func in METADATA:
            return func(*args, **kwargs)
        inputs = list(tensors_in((args, kwargs)))
        self.used.update(map(id, inputs))
        followed = self._use(inputs)
        result = func(*args, **kwargs)
        for tensor in followed:
            self._pass(tensor, name, result)
        return result

    def _pass(self, tensor: _Tensor, name: str, result: Any) -> None:
        before, chain = tensor.value.shape, tensor.chain
        if isinstance(result, torch.Tensor) and _commutes(name, before, result, tensor.axis):
            if result.ndim == tensor.axis + 1:  # flattened
                chain.positions *= prod(before[tensor.axis + 1 :])
            self._tensors[id(result)] = _Tensor(result, chain, tensor.axis)
        else:
            chain.reason = chain.reason or f"{name} lies between"

    def _use(self, values: Any) -> list[_Tensor]:
        """Return those values that are followed, and mark them as used."""
        followed = [self._tensors[id(value)] for value in values if id(value) in self._tensors]
        for tensor in followed:
            if tensor.is_used:
                tensor.chain.reason = _TWICE
            tensor.is_used = True
        return followed


def _name(func: Any) -> str:
    name = getattr(func, "__name__", repr(func))
    return func.__self__.__name__ if name == "__get__" else name


def _axis(layer: Any, ndim: int) -> int:
    """Return the axis of the channels in the input or output of a layer."""
    rank = 0 if isinstance(layer, nn.Linear) else layer.weight.ndim - 2
    return ndim - rank - 1


def _relu_obstacle(layer: nn.Module) -> str:
    """Return why the ReLU that a layer is joined with forbids scaling; empty if it does not."""
    relu = layer.relu if isinstance(layer, LayerReLU) else nn.ReLU()
    return "" if type(relu) is nn.ReLU else f"{type(relu).__name__} lies between"


def _arrive(tensor: _Tensor, name: str, layer: nn.Module) -> None:
    chain = tensor.chain
    chain.second = name
    if tensor.axis != _axis(layer, tensor.value.ndim):
        chain.reason = chain.reason or f"its channels are not the input channels of `{name}`"


def _commutes(name: str, before: torch.Size, after: torch.Tensor, axis: int) -> bool:
    if name in _POOLS:
        return axis == after.ndim - _POOLS[name] - 1
    if name in _FLATTENING:
        return after.shape == (*before[:axis], prod(before[axis:])) or after.shape[: axis + 1] == before[: axis + 1]
    return name in _ELEMENTWISE
