"""Shift the channels of activations by less than a step, so that frequent values lie on levels.

The background of a page, the padding of a batch and what layers make of them are the same value in most places. If it
lies between two levels, all these places have the same error. It does not cancel in the sums behind as the errors of
different values do, and what corrects it in the mean is wrong in all other places.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from klquant.errors import InvalidInputError

from ..execution import Feed, open_onnxruntime, with_outputs
from ...rounding import Array
from ..model.preparation import Prepared
from ..placement import Placement
from ..qdq.grids import Grid
from .parameters import with_parameters
from .shifts import find_shifts, moved

PARTS = 64  # of a step: shifts are multiples of these
POSITIONS = 2048  # of a tensor, over all data
SEED = 0


class Aligner:
    """Data by which channels are shifted, and the shifts found so far: most grids recur in all ways to quantize."""

    def __init__(self, feeds: Sequence[Feed]) -> None:
        self._feeds = feeds
        self._found: dict[object, tuple[Prepared, Array]] = {}

    def __call__(self, base: Prepared, placement: Placement) -> Placement:
        """Return the placement with shifted channels; `base` is the float model before it was rewritten for it."""
        shifts = find_shifts(placement.prepared.graph, placement.plan)
        keys = {
            name: (id(base), name, placement.grids[name], placement.factors.get(name, 1.0), shifts[name].axis)
            for name in shifts
        }
        missing = {name: shifts[name].axis for name, key in keys.items() if key not in self._found}
        for name, values in _channels(placement.prepared, missing, self._feeds).items():
            self._found[keys[name]] = base, best_shift(values, placement.grids[name])
        by = {name: self._found[key][1] for name, key in keys.items()}
        constants = moved(shifts, {name: shift for name, shift in by.items() if shift.any()})
        return placement._replace(prepared=with_parameters(placement.prepared, constants))


def best_shift(values: Array, grid: Grid) -> Array:
    """Return for each channel by what to shift it for the least squared error of rounding.

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
    best = errors.argmin(axis=1)
    found: Array = (best / PARTS - np.rint(best / PARTS)) * grid.scale
    return found


def _channels(prepared: Prepared, axes: Mapping[str, int], feeds: Sequence[Feed]) -> dict[str, Array]:
    """Return values of each tensor in the float model, shape (channels, positions)."""
    found: dict[str, list[Array]] = {name: [] for name in axes}
    if not axes:
        return {}
    with open_onnxruntime(with_outputs(prepared.model, axes), optimized=True) as session:
        for feed in feeds:
            for name, values in session(list(axes), feed).items():
                if not np.isfinite(values).all():
                    raise InvalidInputError(f"tensor `{name}` must be finite, got NaN or infinity")
                rows = np.moveaxis(values, axes[name], 0).reshape(values.shape[axes[name]], -1)
                number = min(rows.shape[1], -(-POSITIONS // len(feeds)))
                found[name].append(rows[:, np.random.default_rng(SEED).choice(rows.shape[1], number, replace=False)])
    return {name: np.concatenate(some, axis=1) for name, some in found.items()}
