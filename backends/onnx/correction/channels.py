"""Channels of activations: what is seen of them, and the factors that make them easier to quantize.

With x in steps of d and output o of W in steps of e_o, rounding adds d^2 / 12 sum_j W_oj^2 + e_o^2 / 12 sum_j E x_j^2
to output o: no run of the model is needed to judge factors.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from klquant.errors import InvalidInputError

from ..execution import open_onnxruntime, with_outputs
from ..feeds import Array
from ..model.preparation import Prepared
from .data import read_feeds

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


def observe_channels(prepared: Prepared, axes: Mapping[str, int], batches: Iterable[Any]) -> dict[str, Channels]:
    """Run the float model; return what the channels of each activation hold, given their axis."""
    seen: dict[str, list[Array]] = {}
    count = dict.fromkeys(axes, 0)
    with open_onnxruntime(with_outputs(prepared.model, axes), optimized=True) as session:
        for number, feed in enumerate(read_feeds(prepared, batches)):
            found = session([name for name in axes if name not in feed] or prepared.graph.outputs, feed)
            for name, axis in axes.items():
                values = np.moveaxis((feed | found)[name], axis, -1)
                rows = values.reshape(-1, values.shape[-1]).astype(np.float64)
                if not np.isfinite(rows).all():
                    raise InvalidInputError(
                        f"tensor `{name}`, batch {number}: values must be finite, got NaN or infinity"
                    )
                low, high, power = seen.setdefault(name, [np.zeros(rows.shape[1]) for _ in range(3)])
                np.minimum(low, rows.min(0, initial=0.0), out=low)
                np.maximum(high, rows.max(0, initial=0.0), out=high)
                power += np.square(rows).sum(0)
                count[name] += len(rows)
    return {name: Channels(low, high, power / max(count[name], 1)) for name, (low, high, power) in seen.items()}


def choose_factors(weights: Sequence[Array], channels: Channels, alpha: float | None) -> tuple[Array, float]:
    """Return a factor for each channel, and the error that is expected with them relative to that without.

    Parameters
    ----------
    weights : sequence of arrays
        Of the layers that read the channels; shape (groups, outputs, channels of a group, other positions).
    channels : Channels
    alpha : float, optional
        How far to even out the activation; without a value the best of some.
    """
    sizes = [np.maximum(channels.high, -channels.low * part) for part in (PARTS if alpha is None else (1.0,))]
    sizes = [np.where(size > 0, np.maximum(size, size.max() / SPAN), 0.0) for size in sizes] if alpha is None else sizes
    alphas = GRID if alpha is None else (alpha,)
    tried = [_factors(weights, size, one) for size in sizes for one in alphas]
    errors = [expected_error(weights, channels, factors) for factors in tried]
    before = expected_error(weights, channels, np.ones(len(channels.power)))
    best = int(np.argmin(errors))
    return tried[best], errors[best] / max(before, TINY)


def expected_error(weights: Sequence[Array], channels: Channels, factors: Array) -> float:
    """Return the error that rounding to 8 bits adds to the outputs, relative to their power, as a sum over layers."""
    step = ((channels.high / factors).max() - (channels.low / factors).min()) / 255
    total = 0.0
    for weight in weights:
        groups, _, size, positions = weight.shape
        scaled = weight * factors.reshape(groups, 1, size, 1)
        power = (channels.power / factors**2).reshape(groups, 1, size, 1)
        steps = np.square(np.abs(scaled).max((2, 3)) / 127).sum(1)
        noise = step**2 * np.square(scaled).sum() + (steps * power.sum((1, 2, 3))).sum() * positions
        total += noise / max(12 * (np.square(scaled) * power).sum(), TINY)
    return float(total)


def _factors(weights: Sequence[Array], sizes: Array, alpha: float) -> Array:
    """Return max|x_j|^alpha / max|W_j|^(1 - alpha), with a geometric mean of 1; 1 for channels without values."""
    largest = np.max([np.abs(weight).max((1, 3)).ravel() for weight in weights], 0)
    used = (sizes > 0) & (largest > 0)
    logs = np.zeros(len(used))
    logs[used] = alpha * np.log(sizes[used]) - (1 - alpha) * np.log(largest[used])
    logs[used] -= logs[used].mean() if used.any() else 0.0
    found: Array = np.exp(np.clip(logs, -MAX_LOG, MAX_LOG))
    return found
