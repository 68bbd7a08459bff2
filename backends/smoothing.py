"""SmoothQuant's factors: how to even out the channels of an activation and the weights that it is multiplied by.

With x in steps of d and output o of W in steps of e_o, rounding adds d^2 / 12 sum_j W_oj^2 + e_o^2 / 12 sum_j E x_j^2
to output o: no run of the model is needed to judge factors.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .accuracy.classes import Array

WORTH = 0.9
"""The expected error must fall to this part of what it was."""
WORTH_A_NODE = 0.8
"""The same where it takes a Mul more, which costs time."""
GRID = tuple(k / 20 for k in range(21))
"""Values of alpha to try."""
PARTS = (1.0, 0.25, 0.0625)
"""How much of the negative half counts: where it is small in all channels, as behind GELU, most levels are positive."""
SPAN = 8.0
"""How much smaller than the largest a channel can count: what was small in some data may be larger in other data."""
MAX_LOG = 7.0
"""Of a factor: about 1000, which float16 can hold."""
TINY = float(np.finfo(np.float64).tiny)


class Channels(NamedTuple):
    """What was seen of the channels of an activation."""

    low: Array
    """Smallest value, at most 0; shape (channels,)."""
    high: Array
    """Largest value, at least 0; shape (channels,)."""
    power: Array
    """Mean square, shape (channels,)."""


class Reader(NamedTuple):
    """A layer that an activation is multiplied by."""

    weight: Array
    """Shape (groups, outputs, channels of a group, other positions)."""
    channels: Channels
    """Of the activation as this layer reads it: another may read it behind pooling."""


def choose_factors(readers: Sequence[Reader], alpha: float | None, headroom: float = 1.0) -> tuple[Array, float]:
    """Return a factor for each channel, and the error that is expected with them relative to that without.

    Parameters
    ----------
    readers : sequence of Reader
    alpha : float, optional
        How far to even out the activation; without a value the best of some.
    headroom : float
        Without alpha, a channel counts as so many times larger, but never larger than the largest.
    """
    parts, alphas = ((1.0,), (alpha,)) if alpha is not None else (PARTS, GRID)
    seen = {id(one.channels): one.channels for one in readers}.values()
    sizes = [np.maximum(one.high, -one.low * part) for one in seen for part in parts]
    if alpha is None:
        sizes = [np.where(size > 0, np.clip(headroom * size, size.max() / SPAN, size.max()), 0.0) for size in sizes]
    tried = [_factors(readers, size, one) for size in sizes for one in alphas]
    errors = [expected_error(readers, factors) for factors in tried]
    before = expected_error(readers, np.ones(len(sizes[0])))
    best = int(np.argmin(errors))
    return tried[best], errors[best] / max(before, TINY)


def expected_error(readers: Sequence[Reader], factors: Array) -> float:
    """Return the error that rounding to 8 bits adds to the outputs, relative to their power, as a sum over layers."""
    total = 0.0
    for weight, channels in readers:
        step = ((channels.high / factors).max() - (channels.low / factors).min()) / 255
        groups, _, size, positions = weight.shape
        scaled = weight * factors.reshape(groups, 1, size, 1)
        power = (channels.power / factors**2).reshape(groups, 1, size, 1)
        steps = np.square(np.abs(scaled).max((2, 3)) / 127).sum(1)
        noise = step**2 * np.square(scaled).sum() + (steps * power.sum((1, 2, 3))).sum() * positions
        total += noise / max(12 * (np.square(scaled) * power).sum(), TINY)
    return float(total)


def _factors(readers: Sequence[Reader], sizes: Array, alpha: float) -> Array:
    """Return max|x_j|^alpha / max|W_j|^(1 - alpha), with a geometric mean of 1; 1 for channels without values."""
    largest = np.max([np.abs(weight).max((1, 3)).ravel() for weight, _ in readers], 0)
    used = (sizes > 0) & (largest > 0)
    logs = np.zeros(len(used))
    logs[used] = alpha * np.log(sizes[used]) - (1 - alpha) * np.log(largest[used])
    logs[used] -= logs[used].mean() if used.any() else 0.0
    found: Array = np.exp(np.clip(logs, -MAX_LOG, MAX_LOG))
    return found
