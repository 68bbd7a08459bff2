"""A tensor in parts that are views, however it is strided: to read it without a copy of all of it."""

from collections.abc import Iterator

import torch


def parts(tensor: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """Yield views of at most `size` values that make up a tensor, in the order in which they are stored."""
    stored = as_stored(tensor)
    yield from stored.view(-1).split(size) if stored.is_contiguous() else _slices(stored, size)


def as_stored(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor with its axes in the order in which they are stored: contiguous if it is dense."""
    strides = tensor.stride()
    return tensor.permute(sorted(range(tensor.ndim), key=lambda axis: -strides[axis]))


def _slices(tensor: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    if tensor.numel() <= size:
        yield tensor
        return
    for piece in tensor.split(max(1, size // tensor[0].numel())):
        yield from _slices(piece if len(piece) > 1 else piece[0], size)
