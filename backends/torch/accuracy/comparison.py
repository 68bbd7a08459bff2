"""Compare a model with its approximation: sums over tensors, hooks on calls, a model whose layers can be switched."""

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from ...accuracy.sums import Sums
from ...thresholds import LayerThreshold
from ..model.forward import Where, whole
from ..model.hooks import active
from ..model.layers import observed_layers
from ..simulation import fake_quantize, quantized_layers, simulate


def compare(reference: torch.Tensor, approximation: torch.Tensor) -> Sums:
    """Sum in float64 over two tensors of one shape, only where the reference is finite: masks may hold infinity."""
    x, y = (whole(tensor.detach()).double().flatten() for tensor in (reference, approximation))
    finite = x.isfinite()
    if not finite.all():
        x, y = x[finite], y[finite]
    noise = x - y
    return Sums(*torch.stack([x @ x, noise @ noise, x @ y, y @ y]).tolist())


def fake_quantize_at(x: torch.Tensor, layer: LayerThreshold) -> torch.Tensor:
    """Return an activation rounded to INT8 at the threshold of its layer."""
    scale = torch.tensor(layer.scale, dtype=torch.float32, device=x.device)
    return fake_quantize(x, scale, num_bits=layer.num_bits)


class Call(NamedTuple):
    """One call of a layer."""

    layer: str
    input: torch.Tensor
    output: torch.Tensor
    again: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    """Calls another layer on another input, with the same other arguments."""


@contextmanager
def each_call(layers: Mapping[str, nn.Module], observer: Callable[[Call], None]) -> Iterator[None]:
    """Call the observer for every call of the layers, which have the names given here."""

    def reporting(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> None:
            def again(other: nn.Module, x: torch.Tensor) -> Any:
                return other(x, *args[1:], **kwargs) if args else other(**{**kwargs, "input": x})

            observer(Call(name, args[0] if args else kwargs["input"], output, again))

        return hook

    with active(layer.register_forward_hook(reporting(name), with_kwargs=True) for name, layer in layers.items()):
        yield


class SwitchableModel:
    """An INT8 simulation of a model, in which any layers can be switched to floating point.

    It is one copy of the model. A switched layer is that of the model itself, registered in place of the quantized one.
    """

    def __init__(
        self,
        model: nn.Module,
        weight_scales: Mapping[str, torch.Tensor],
        thresholds: Mapping[str, LayerThreshold],
        observe: Where,
    ) -> None:
        simulated = simulate(model, weight_scales, thresholds, observe=observe)
        floats, quantized = dict(observed_layers(model)), quantized_layers(simulated) if thresholds else {}
        self.floats = {name: floats[name] for name in thresholds}
        self.quantized: dict[str, Any] = {name: quantized[name] for name in thresholds}
        self._root = nn.ModuleList([simulated])  # the parent of the model, which may be a single layer
        self._places: dict[int, list[tuple[nn.Module, str]]] = {id(layer): [] for layer in self.quantized.values()}
        for parent in self._root.modules():
            for key, child in parent._modules.items():
                if id(child) in self._places:
                    self._places[id(child)].append((parent, key))

    def quantizing(self, names: Container[str]) -> nn.Module:
        """Return the model with these layers in INT8 and the others in floating point; it changes in the next call."""
        for name, quantized in self.quantized.items():
            for parent, key in self._places[id(quantized)]:
                parent._modules[key] = quantized if name in names else self.floats[name]
        return self._root[0]
