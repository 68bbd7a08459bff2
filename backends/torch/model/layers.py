"""The layers of a model: which are quantized, which are skipped and why, and their fingerprints."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from klquant.errors import InvalidInputError

from ...calibration import Fingerprint

Layer: TypeAlias = nn.Module  # a convolution or linear layer, bare or as LayerReLU

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
RELUS = (nn.ReLU, nn.ReLU6)

_CLOSED = (nn.MultiheadAttention, torch.jit.ScriptModule)
_SKIPPED: dict[Any, str] = {
    nn.MultiheadAttention: "the projections inside attention are not quantized",
    torch.jit.ScriptModule: "the layers inside TorchScript are not quantized",
    (nn.Embedding, nn.EmbeddingBag): "the table of an embedding is not quantized",
    (nn.RNNBase, nn.RNNCellBase): "recurrent layers are not quantized",
    nn.Bilinear: "bilinear layers are not quantized",
}


class LayerWrapper(nn.Module):
    """Takes the place of a layer and has its attributes, such as ``weight``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.train(layer.training)

    def __getattr__(self, name: str) -> Any:
        """Return the attribute of the wrapper, or else that of the layer, since models read them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise  # the wrapper is not copied or pickled as its layer is
            return getattr(super().__getattr__("layer"), name)


class LayerReLU(LayerWrapper):
    """A layer and the ReLU that follows it, observed and quantized as one."""

    def __init__(self, layer: nn.Module, relu: nn.Module) -> None:
        super().__init__(layer)
        self.relu = relu

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return relu(layer(x))."""
        result: torch.Tensor = self.relu(self.layer(*args, **kwargs))
        return result


def weighted_layers(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    """Yield each layer that is quantized, with its qualified name in the user's model."""
    joined = {id(module.layer) for module in model.modules() if isinstance(module, LayerWrapper)}
    for name, module in model.named_modules():
        if isinstance(module, LayerReLU) or (is_quantizable(module) and id(module) not in joined):
            yield name, module


def skipped_layers(model: nn.Module) -> dict[str, str]:
    """Return why modules with weights stay in floating point, by qualified name."""
    skipped: dict[str, str] = {}
    closed: tuple[str, ...] = ()  # prefixes of names: modules inside these are not listed one by one
    for name, module in model.named_modules():
        if not name.startswith(closed) and (reason := _why_skipped(module)):
            skipped[name] = reason
            if isinstance(module, _CLOSED):
                closed = (*closed, f"{name}." if name else "")
    return skipped


def _why_skipped(module: nn.Module) -> str:
    for kinds, reason in _SKIPPED.items():
        if isinstance(module, kinds):
            return reason
    if isinstance(module, WEIGHTED) and not is_quantizable(module):
        return f"{type(module).__name__} is a subclass, or its weights are computed from other parameters"
    return ""


def is_quantizable(module: nn.Module) -> bool:
    """Return whether a module is a layer of a known class whose weight is a parameter."""
    return type(module) in WEIGHTED and "weight" in module._parameters


def check_supported(model: nn.Module) -> None:
    """Raise InvalidInputError for TorchScript, for lazy modules without weights, and for compiled modules.

    Hooks do not run inside TorchScript and compiled modules.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise InvalidInputError(
            f"expected a model of Python modules, got TorchScript ({type(model).__name__}), whose layers cannot be "
            f"observed; quantize the model that it was scripted or traced from"
        )
    for name, module in model.named_modules():
        if "_orig_mod" in module._modules:
            raise InvalidInputError(
                f"expected a model before torch.compile, got `{name}`, which is compiled; use its _orig_mod"
            )
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise InvalidInputError(
                f"expected a model with all its weights, got `{name}`: a {type(module).__name__} that was never run"
            )


def inner_layer(layer: Layer) -> Any:
    """Return the layer that holds the weights."""
    return layer.layer if isinstance(layer, LayerReLU) else layer


def channel_axis(layer: nn.Module) -> int:
    """Return the axis of the weights for output channels; of one group, in transposed convolutions."""
    return 1 if type(layer) in TRANSPOSED else 0


_COUNTERS = ("num_batches_tracked",)  # of BatchNorm, which computes the same whatever it is


def fingerprint(model: nn.Module) -> dict[str, Fingerprint]:
    """Return the fingerprint of every module with its own parameters or buffers, by qualified name."""
    found = {}
    for name, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        tensors = {key: tensor.detach() for key, tensor in own if key not in _COUNTERS}
        if tensors:
            shapes = (f"{key} {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for key, t in tensors.items())
            found[name] = Fingerprint(f"{type(module).__name__}({', '.join(shapes)})", _hash_of(tensors.values()))
    return found


def _hash_of(tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """Return the values of a tensor of any dtype as contiguous bytes."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
