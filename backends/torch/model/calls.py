"""Layers that are called several times in one run of a model, each time on another tensor: each call gets a range.

Engines have one range for a tensor, not for a layer: a detection head that is called on five levels of a pyramid reads
five tensors. The layer is wrapped, and call k passes its tensor through tap k, which is named ``head.conv@k``. Loops
with many calls keep one range.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...settings import Observe
from .edits import replace_module
from .layers import LayerWithTaps, Tap, point_name

MOST = 16  # calls with their own range; more of them are a loop


def call_names(name: str, calls: Mapping[str, int]) -> list[str]:
    """Return the names of the calls of a layer or tap, which is its own name if it is called once."""
    return [f"{name}@{k}" for k in range(calls[name])] if name in calls else [name]


def layer_of(name: str) -> str:
    """Return the name of the layer or tap of a call."""
    return re.sub(r"@\d+$", "", name)


class Calls(LayerWithTaps):
    """A layer, or a tap, that is called so many times in one run of the model; each call has a tap."""

    def __init__(self, layer: nn.Module, number: int, observe: Observe, device: torch.device) -> None:
        super().__init__(layer)
        self.number, self.observe, self.done = number, observe, 0
        for k in range(number):
            self.add_module(f"@{k}", Tap(device))

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Call the layer with its input, or its output, passed through the tap of this call."""
        tap: Any = self._modules[f"@{self.done % self.number}"]
        self.done += 1
        if self.observe == "outputs":
            result: torch.Tensor = tap(self.layer(*args, **kwargs))
        elif args:
            result = self.layer(tap(args[0]), *args[1:], **kwargs)
        else:
            result = self.layer(**{**kwargs, "input": tap(kwargs["input"])})
        return result


def separate_calls(model: nn.Module, calls: Mapping[str, int], observe: Mapping[str, Observe]) -> None:
    """Wrap, in a model that the caller owns, the layers and taps with these names and numbers of calls."""
    if not calls:
        return
    modules = {point_name(path): module for path, module in model.named_modules()}
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    for name, number in calls.items():
        layer = modules[name]
        place = "inputs" if isinstance(layer, Tap) else observe.get(f"{name}@0", "inputs")
        replace_module(layer, Calls(layer, number, place, device))
    model.register_forward_pre_hook(_start_again)


def _start_again(model: nn.Module, args: Any) -> None:
    """Count calls from 0 in every run of the model."""
    for module in model.modules():
        if isinstance(module, Calls):
            module.done = 0
