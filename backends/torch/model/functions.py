"""Functions that a model calls outside its modules: which only read metadata, are a ReLU, multiply or add."""

from typing import Any

import torch
from torch.nn import functional

# these do not use the values of a tensor
METADATA = {
    getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda", "layout")
} | {
    getattr(torch.Tensor, name)
    for name in ("size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "__len__")
}

_RELU = {torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_, functional.relu}
_HARDTANH = {functional.hardtanh, functional.hardtanh_}

# the names are the same in torch, torch.Tensor, torch.linalg, torch.nn.functional and torch.ops.aten
_PRODUCTS = {
    *("linear", "bilinear", "embedding", "embedding_bag"),
    *(f"{kind}{rank}d" for kind in ("conv", "conv_transpose") for rank in (1, 2, 3)),
    *("conv_tbc", "convolution", "_convolution"),
    *("matmul", "mm", "bmm", "mv", "dot", "vdot", "vecdot", "inner", "einsum", "tensordot", "multi_dot"),
    *("addmm", "addmv", "addbmm", "baddbmm", "chain_matmul", "linalg_multi_dot", "_grouped_mm", "grouped_mm"),
    *("scaled_dot_product_attention", "multi_head_attention_forward"),
}
ADD = "add"
_ADDITIONS = {ADD: ADD, "__add__": ADD, "add_": "add_", "__iadd__": "add_"}
_OPERATORS = {"__matmul__": "matmul", "__rmatmul__": "matmul", "__imatmul__": "matmul"}


def relu_kind(function: Any, args: Any, kwargs: Any) -> str:
    """Return `relu` or `relu6` if the call is one, in place or not, else an empty string."""
    if function in _RELU or getattr(function, "_opname", "") in ("relu", "relu_"):
        return "relu"
    if function is functional.relu6:
        return "relu6"
    if function in _HARDTANH:
        low, high = ([*args[1:3], *(kwargs[name] for name in ("min_val", "max_val") if name in kwargs)] + [None] * 2)[
            :2
        ]
        return "relu6" if (low, high) == (0, 6) else ""
    return ""


def product_name(function: Any) -> str:
    """Return the name of a function that multiplies activations by activations or weights, else an empty string."""
    name = getattr(function, "__name__", "")
    if name in _PRODUCTS:
        return str(name)
    name = str(name).partition(".")[0]  # torch.ops has names such as mm.default
    name = _OPERATORS.get(name, name if name in _PRODUCTS else name.removesuffix("_"))
    return name if name in _PRODUCTS else ""


def addition_kind(function: Any) -> str:
    """Return `add` for a function that adds, `add_` for one that does so in place, else an empty string."""
    return _ADDITIONS.get(str(getattr(function, "__name__", "")).partition(".")[0], "")
