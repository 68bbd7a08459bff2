"""Refuse models that are quantized already: their layers would be rounded twice, or only some of them."""

from itertools import chain

import torch
from torch import nn

from klquant.errors import InvalidInputError

from ..simulation import QuantizedLayer

_PACKAGES = (
    "torch.ao.nn.quantized.",
    "torch.ao.nn.sparse.quantized.",
    "torch.ao.nn.intrinsic.quantized.",
    "torch.ao.nn.intrinsic.qat.",
    "torch.ao.nn.qat.",
    "torch.ao.quantization.fake_quantize",
    "torchao.",
    "modelopt.torch.quantization.nn.modules.tensor_quantizer",
)
_FLOAT = ("FloatFunctional", "FXFloatFunctional")  # live among quantized modules, and compute in floating point


def check_float(model: nn.Module) -> None:
    """Raise InvalidInputError, naming the first layer that is quantized or simulates it."""
    for name, module in model.named_modules():
        if _is_quantized(module):
            raise InvalidInputError(
                f"expected a model in floating point, got layer `{name}`, which is quantized already "
                f"({type(module).__name__}); quantize the model that it was made from"
            )


def _is_quantized(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return False
    if isinstance(module, QuantizedLayer):
        return True
    kinds = [f"{kind.__module__}." for kind in type(module).__mro__ if kind.__name__ not in _FLOAT]
    if any(kind.startswith(_PACKAGES) for kind in kinds):
        return True
    own = chain(module.parameters(recurse=False), module.buffers(recurse=False))
    return any(t.is_quantized or type(t).__module__.startswith("torchao.") for t in own) or _has_small_weight(module)


def _has_small_weight(module: nn.Module) -> bool:
    """Return whether a parameter holds 8 bits a value: integers, or a float8."""
    return any(p.dtype.itemsize == 1 and p.dtype != torch.bool for p in module.parameters(recurse=False))
