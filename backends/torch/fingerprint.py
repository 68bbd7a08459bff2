"""What tells one model from another, layer by layer, so that a saved calibration is not used for a wrong one."""

import hashlib
from collections.abc import Iterable

import torch
from torch import nn

from ..calibration import Fingerprint

_COUNTERS = ("num_batches_tracked",)  # of BatchNorm: the function does not depend on it


def fingerprint(model: nn.Module) -> dict[str, Fingerprint]:
    """Return the fingerprint of every module that owns parameters or buffers, by qualified name."""
    found = {}
    for name, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        tensors = {key: tensor.detach() for key, tensor in own if key not in _COUNTERS}
        if tensors:
            shapes = (f"{key} {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for key, t in tensors.items())
            found[name] = Fingerprint(f"{type(module).__name__}({', '.join(shapes)})", _digest(tensors.values()))
    return found


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """Return the values of a tensor of any dtype as they lie in memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
