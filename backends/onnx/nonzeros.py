"""Tensors that are kept for the second pass, without their zeros: behind a ReLU these are half of the values."""

from typing import NamedTuple

import numpy as np

from ..collection import Bins, Counted, count
from .feeds import Array

FEW = 0.25  # a smaller share of zeros is not worth leaving out


class Nonzeros(NamedTuple):
    """The values of a tensor but for its zeros, or all of them where zeros are few."""

    values: Array
    zeros: int
    """How many are left out."""
    ends: tuple[float, float]
    """Smallest and largest value of the tensor."""


def without_zeros(tensor: Array, ends: tuple[float, float]) -> Nonzeros:
    """Return a copy of the values that are not 0, or the tensor itself if it has few zeros."""
    is_nonzero = tensor.reshape(-1) != 0
    zeros = tensor.size - int(np.count_nonzero(is_nonzero))
    if zeros <= FEW * tensor.size:
        return Nonzeros(tensor, 0, ends)
    return Nonzeros(np.compress(is_nonzero, tensor), zeros, ends)


def count_with_zeros(kept: Nonzeros, bins: Bins) -> Counted:
    """Return the counts of the whole tensor."""
    counts, zeros = count(kept.values, bins, kept.ends)
    centre = np.zeros_like(counts)
    centre[len(counts) // 2] = kept.zeros
    return Counted(counts + centre, zeros + kept.zeros)
