"""The result of every search: the threshold, and its effect on the histogram."""

import math
from collections.abc import Iterable
from types import ModuleType
from typing import NamedTuple

import numpy as np

from klquant._namespace import Array, is_concrete
from klquant.errors import InfeasibleError

ROUNDING = 2.0**-48  # of a value: a smaller distance from a level counts as none
_MAX_ROWS = 30  # in a notebook
_COLUMNS = {"T": ".6g", "index": ".0f", "KL nats": ".4g", "clipped": ".3%", "SQNR dB": ".1f"}


class Threshold(NamedTuple):
    """A clipping threshold and its quality. ``float(threshold)`` is the value.

    The fields are scalars, or arrays of the batch shape, in the library of the histogram.
    """

    value: Array
    """T, in units of the edges and in their dtype."""
    index: Array
    """Number of the candidate, from the narrowest (int32); -1 if T was not chosen among candidates."""
    divergence: Array
    """KL divergence at T, in nats (float64); NaN for other criteria."""
    clipped: Array
    """Share of the counts beyond T (float64)."""
    sqnr_db: Array
    """Expected signal-to-quantization-noise ratio at T, in dB (float64), with all values at their bins' centres."""
    tie_low: Array = math.nan
    """Smallest T among candidates with a divergence at most 1 % above the least, or `tie_width` above it if given."""
    tie_high: Array = math.nan
    """Largest T of these candidates; NaN for other criteria, like `tie_low`."""

    def __float__(self) -> float:
        """Return the clipping value."""
        return float(self.value)

    def _repr_html_(self) -> str | None:
        """Return a table for notebooks, with a row for each histogram; None while JAX traces."""
        if not is_concrete(*self):
            return None
        shown = self[: len(_COLUMNS)]
        numbers = np.stack([np.asarray(column, dtype=np.float64).reshape(-1) for column in shown], axis=1)
        where = np.ndindex(np.shape(self.value))
        rows = [
            [f"Threshold{list(index) or ''}", *map(format, row, _COLUMNS.values())]
            for index, row in zip(where, numbers[:_MAX_ROWS], strict=False)
        ]
        if len(numbers) > _MAX_ROWS:
            rows.append([f"... {len(numbers) - _MAX_ROWS} more"])
        head = "".join(f"<th>{title}</th>" for title in ("", *_COLUMNS))
        lines = ("".join(f"<td>{cell}</td>" for cell in row) for row in rows)
        return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def describe(
    hist: Array,
    edges: Array,
    value: Array,
    index: Array,
    divergence: Array,
    *,
    num_quantized_bins: int,
    ties: Iterable[Array] = (),
    xp: ModuleType,
) -> Threshold:
    """Return the threshold with its clipped share and expected SQNR, for one histogram; `ties` are a range of T."""
    counts, edges_64 = hist.astype(xp.float64), edges.astype(xp.float64)
    low, high, wide = edges_64[:-1], edges_64[1:], value.astype(xp.float64)
    beyond = xp.clip((high - wide) / (high - low), 0, 1) + xp.clip((-wide - low) / (high - low), 0, 1)
    centre, qmax = (low + high) / 2, num_quantized_bins // 2
    step = wide / qmax
    noise = centre - xp.clip(xp.rint(centre / step), -qmax, qmax) * step
    noise = xp.where(xp.abs(noise) <= ROUNDING * xp.abs(centre), 0.0, noise)  # a fused product rounds differently
    sqnr = 10 * xp.log10((counts * centre**2).sum() / (counts * noise**2).sum())
    exact = edges if edges.dtype.kind == "f" else edges_64
    return Threshold(
        value.astype(exact.dtype)[()],
        index.astype(xp.int32)[()],
        divergence[()],
        (counts * beyond).sum() / counts.sum(),
        sqnr,
        *(tie.astype(exact.dtype)[()] for tie in tuple(ties) or (xp.asarray(xp.nan),) * 2),
    )


def check_found(threshold: Threshold, what: str) -> Threshold:
    """Raise InfeasibleError if a threshold is missing, unless JAX traces and the values are unknown."""
    if is_concrete(threshold.value):
        missing = np.isnan(np.asarray(threshold.value, dtype=np.float64))
        if missing.any():
            where = f" (histograms {np.flatnonzero(missing)[:10].tolist()} of the batch)" if missing.ndim else ""
            raise InfeasibleError(f"`hist` must have {what}{where}")
    return threshold
