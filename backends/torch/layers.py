"""Which modules are quantized, and how to find and replace them in a model."""

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import nn

Layer: TypeAlias = nn.Module  # a convolution or linear layer, bare or as LayerReLU

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
RELUS = (nn.ReLU, nn.ReLU6)


class LayerWrapper(nn.Module):
    """Stands in the place of a layer; attributes of the layer (``weight``, ...) are found here too."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.train(layer.training)

    def __getattr__(self, name: str) -> Any:
        """Return the attribute of the wrapper, or else that of the layer: models do read them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


class LayerReLU(LayerWrapper):
    """A layer with the ReLU that follows it: observed and quantized as one."""

    def __init__(self, layer: nn.Module, relu: nn.Module) -> None:
        super().__init__(layer)
        self.relu = relu

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return relu(layer(x))."""
        result: torch.Tensor = self.relu(self.layer(*args, **kwargs))
        return result


def weighted_layers(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    """Yield qualified name and module of each layer that is quantized, in the user's names."""
    joined = {id(module.layer) for module in model.modules() if isinstance(module, LayerWrapper)}
    for name, module in model.named_modules():
        if isinstance(module, LayerReLU) or (_is_quantizable(module) and id(module) not in joined):
            yield name, module


def skipped_layers(model: nn.Module) -> dict[str, str]:
    """Return the layers with weights that stay in floating point, by qualified name, and why."""
    skipped = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            skipped[name] = "the projections inside attention are not quantized"
        elif isinstance(module, WEIGHTED) and not _is_quantizable(module) and name.rpartition(".")[0] not in skipped:
            skipped[name] = f"{type(module).__name__} is no plain layer, or computes its weights from others"
    return skipped


def _is_quantizable(module: nn.Module) -> bool:
    return type(module) in WEIGHTED and "weight" in module._parameters


def inner_layer(layer: Layer) -> Any:
    """Return the layer that holds the weights."""
    return layer.layer if isinstance(layer, LayerReLU) else layer


def channel_axis(layer: nn.Module) -> int:
    """Return the axis of the weights that runs over output channels (of one group, when transposed)."""
    return 1 if type(layer) in TRANSPOSED else 0


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put `new` wherever `old` is registered, under all its names; return the model, or `new` if that was all of it."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() hides a second name of the same module
            if child is old and parent is not new:
                setattr(parent, name, new)
    return new if model is old else model
