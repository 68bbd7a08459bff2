"""What to say when a model fails on a batch of a loader: what the batch is, and the line to write."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from .arguments import describe, has_optional_items, main_item


def advice(model: Any, batch: Any, *, is_call: bool) -> str:
    """Return what a batch is and the `forward` to pass, to end an error message; empty if the batch looks right.

    Parameters
    ----------
    model : torch.nn.Module
    batch
        What the model failed on.
    is_call : bool
        Whether the call itself failed, before any layer.
    """
    item, code = _input_of(batch)
    reasons, code = _convert(model, item, code)
    if not reasons and not is_call and not has_optional_items(model, batch):
        return ""
    what = f" ({', '.join(reasons)})" if reasons else ""
    line = "..." if code == "batch" else f"model({code})"
    return f"; batches are {describe(batch)}{what}; pass forward=lambda model, batch: {line}"


def _input_of(batch: Any) -> tuple[Any, str]:
    """Return what is probably the input of the model, and how to write it."""
    keys = list(batch) if isinstance(batch, Mapping) else range(len(batch)) if isinstance(batch, (tuple, list)) else []
    if not keys:
        return batch, "batch"
    items = [batch[key] for key in keys]
    main = main_item(items) or 0
    return items[main], f"batch[{keys[main]!r}]"


def _convert(model: Any, item: Any, code: str) -> tuple[list[str], str]:
    """Return what keeps the model from taking the item, and the code that converts it."""
    reasons = []
    if isinstance(item, np.ndarray) and item.dtype.kind in "fiub":
        reasons.append("NumPy arrays")
        item, code = torch.from_numpy(np.ascontiguousarray(item)), f"torch.from_numpy({code})"
    if not isinstance(item, torch.Tensor):
        return reasons, code
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    wanted = torch.float32 if weight is None else weight.dtype
    if _is_channels_last(model, item):
        reasons.append("channels last, NHWC")
        code += ".permute(0, 3, 1, 2)"
    if item.dtype == torch.uint8:
        reasons.append("uint8")
        code += ".float() / 255" if wanted == torch.float32 else f".to({wanted}) / 255"
    elif item.is_floating_point() and item.dtype != wanted:
        reasons.append(f"{item.dtype}, where the weights are {wanted}")
        code += f".to({wanted})"
    if weight is not None and item.device != weight.device:
        reasons.append(f"on {item.device}, where the model is on {weight.device}")
        code = f"({code}).to('{weight.device}')" if " / " in code else f"{code}.to('{weight.device}')"
    return reasons, code


def _is_channels_last(model: Any, image: torch.Tensor) -> bool:
    """Return whether images have their channels behind, seen from the first convolution."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None or image.ndim != 4:
        return False
    return image.shape[3] == first.in_channels != image.shape[1]
