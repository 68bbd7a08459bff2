"""Shift the channels of activations by less than a step, so that frequent values lie on levels.

The background of a page, the padding of a batch and what layers make of them are the same value in most places. If it
lies between two levels, all these places have the same error. It does not cancel in the sums behind as the errors of
different values do, and what corrects it in the mean is wrong in all other places.
"""

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np

from klquant.errors import InvalidInputError

from ...rounding import Array
from ..execution import Feed, open_onnxruntime, with_outputs
from ..model.preparation import Prepared
from ..placement import Placement
from ..qdq.grids import Grid
from .parameters import with_parameters
from .patches import some_rows
from .shifts import find_shifts, moved

PARTS = 64  # of a step: shifts are multiples of these
POSITIONS = 2048  # of a tensor, over all data
CHANCE = 2.7
"""Over the root of the number of positions: the part of the error that has to go.

That is three standard deviations of the mean of so many squares, if values lie anywhere between two levels.
"""
AT_ONCE = 16  # tensors that are held at the same time


def aligned(placement: Placement, feeds: Sequence[Feed]) -> Placement:
    """Return the placement with shifted channels in its float model, as some data say."""
    shifts = find_shifts(placement.prepared.graph, placement.plan)
    if not shifts:
        return placement
    values = _channels(placement.prepared, {name: shift.axis for name, shift in shifts.items()}, feeds)
    best = {name: best_shift(rows, placement.grids[name]) for name, rows in values.items()}
    by = {name: shift for name, shift in best.items() if shift.any()}
    return placement._replace(prepared=with_parameters(placement.prepared, moved(shifts, by)))


def best_shift(values: Array, grid: Grid) -> Array:
    """Return by what to shift each channel for the least squared error of rounding; 0 if the gain may be chance.

    Parameters
    ----------
    values : array, shape (channels, positions)
    grid : Grid

    Returns
    -------
    array of float64, shape (channels,)
        From half a step down to half a step up.
    """
    steps = values.astype(np.float64) / grid.scale
    bins = np.floor((steps - np.floor(steps)) * PARTS).astype(np.int64) % PARTS
    channels = len(values)
    counts = np.bincount((bins + PARTS * np.arange(channels)[:, None]).ravel(), minlength=channels * PARTS)
    counts = counts.reshape(channels, PARTS)
    middles = (np.arange(PARTS) + 0.5) / PARTS
    squares = np.square(middles - np.rint(middles))
    errors = np.stack([counts @ np.roll(squares, -k) for k in range(PARTS)], axis=1)
    if errors.min(axis=1).sum() > (1 - CHANCE / np.sqrt(values.shape[1])) * errors[:, 0].sum():
        return np.zeros(channels)
    best = errors.argmin(axis=1)
    found: Array = (best / PARTS - np.rint(best / PARTS)) * grid.scale
    return found


def _channels(prepared: Prepared, axes: Mapping[str, int], feeds: Sequence[Feed]) -> dict[str, Array]:
    """Return values of each tensor in the float model, shape (channels, positions)."""
    found: dict[str, list[Array]] = {name: [] for name in axes}
    names, limit = list(axes), -(-POSITIONS // len(feeds))
    groups = [names[k : k + AT_ONCE] for k in range(0, len(names), AT_ONCE)]
    with open_onnxruntime(with_outputs(prepared.model, axes), optimized=True) as session:
        for feed, group in product(feeds, groups):
            for name, values in session(group, feed).items():
                if not np.isfinite(values).all():
                    raise InvalidInputError(f"tensor `{name}` must be finite, got NaN or infinity")
                channels_last = np.moveaxis(values, axes[name], -1)
                found[name].append(some_rows(channels_last.reshape(-1, channels_last.shape[-1]), limit).T)
    return {name: np.concatenate(some, axis=1) for name, some in found.items()}
