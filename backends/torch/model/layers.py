"""The layers of a model: which are quantized, which are skipped and why, and their fingerprints."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn import functional
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


class LayerWithTaps(LayerWrapper):
    """A layer whose calls are observed apart."""


class LayerReLU(LayerWrapper):
    """A layer and the ReLU that follows it, observed and quantized as one."""

    def __init__(self, layer: nn.Module, relu: nn.Module) -> None:
        super().__init__(layer)
        self.relu = relu

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return relu(layer(x))."""
        result: torch.Tensor = self.relu(self.layer(*args, **kwargs))
        return result


class Tap(nn.Module):
    """An identity, where an operand of a function is observed and rounded like the input of a layer."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.eval()

    def forward(self, operand: torch.Tensor) -> torch.Tensor:
        """Return the operand."""
        return operand


class SameConv2d(nn.Conv2d):
    """A convolution that pads its input so that the output has ceil(size / stride) pixels, as in TensorFlow."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the convolution of the padded input."""
        sizes: list[int] = []
        for size, kernel, stride, dilation in zip(
            x.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True
        ):
            missing = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            sizes = [missing // 2, missing - missing // 2, *sizes]  # the last dimension comes first
        x = functional.pad(x, sizes)
        return functional.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def weighted_layers(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    """Yield each layer that is quantized, with its qualified name in the user's model."""
    return observed_layers(model, taps=False)


def observed_layers(model: nn.Module, *, taps: bool = True) -> Iterator[tuple[str, Layer]]:
    """Yield each layer and tap with its name; the layers that have taps only without these."""
    hidden = {id(module.layer) for module in model.modules() if isinstance(module, LayerWrapper)}
    hidden |= {id(module.out_proj) for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    for name, module in model.named_modules():
        if isinstance(module, LayerWithTaps) and not taps and not isinstance(module.layer, Tap):
            yield point_name(name), module.layer
        is_layer = isinstance(module, LayerReLU) or is_quantizable(module)
        if (is_layer or (taps and isinstance(module, Tap))) and id(module) not in hidden:
            yield point_name(name), module


def point_name(path: str) -> str:
    """Return the name of what is at this path in a model with points: `a:matmul.0.input` for `a.:matmul.0.input`."""
    return path.replace(".:", ":").replace(".@", "@")


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
        return f"{type(module).__name__} computes more than its base class, or has a weight that is no parameter"
    return ""


def is_quantizable(module: nn.Module) -> bool:
    """Return whether a module computes what a plain layer computes, with a weight that is a parameter."""
    return isinstance(module, WEIGHTED) and keeps_forward(module) and "weight" in module._parameters


def keeps_forward(module: nn.Module) -> bool:
    """Return whether a convolution or linear layer computes what its base class computes."""
    if isinstance(module, SameConv2d):
        return True
    base: Any = next(kind for kind in WEIGHTED if isinstance(module, kind))
    methods = ("forward", "_conv_forward", "__call__")
    same = all(getattr(type(module), name, None) is getattr(base, name, None) for name in methods)
    return same and not {"forward", "_conv_forward"} & vars(module).keys()


def check_supported(model: nn.Module) -> None:
    """Raise InvalidInputError for TorchScript, for compiled modules, and for modules without weights: lazy or meta.

    Hooks do not run inside TorchScript and compiled modules.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise InvalidInputError(
            f"expected a model of Python modules, got TorchScript ({type(model).__name__}), whose layers cannot be "
            f"observed; quantize the model that it was scripted or traced from"
        )
    for name, module in model.named_modules():
        owner = f"`{name}`" if name else "the model"
        if "_orig_mod" in module._modules:
            raise InvalidInputError(
                f"expected a model before torch.compile, got {owner}, which is compiled; use its _orig_mod"
            )
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise InvalidInputError(
                f"expected a model with all its weights, got {owner}: a {type(module).__name__} that was never run"
            )
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor.is_meta:
                raise InvalidInputError(
                    f"expected a model with all its weights, got `{key}` of {owner} on the meta device, "
                    f"which holds no values; load the weights first"
                )


def inner_layer(layer: Layer) -> Any:
    """Return the layer that holds the weights."""
    return layer.layer if isinstance(layer, LayerReLU) else layer


def channel_axis(layer: nn.Module) -> int:
    """Return the axis of the weights for output channels; of one group, in transposed convolutions."""
    return 1 if isinstance(layer, TRANSPOSED) else 0


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
