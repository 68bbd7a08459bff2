"""The result of every search: the threshold, and its effect on the histogram."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from klquant._namespace import Array, fields_of, in_float64, is_array, is_concrete, part_of, register_record
from klquant.errors import InfeasibleError

ROUNDING = 2.0**-48  # of a value: a smaller distance from a level counts as none
_MAX_ROWS = 30  # in a notebook
_COLUMNS = {"T": ".6g", "index": ".0f", "KL nats": ".4g", "clipped": ".3%", "SQNR dB": ".1f"}


@dataclass(frozen=True, eq=False, repr=False)
class Threshold:
    """A clipping threshold and its quality, or those of a batch. ``float(threshold)`` is the value.

    The fields are scalars, or arrays of the batch shape, in the library of the histogram. A batch is indexed like its
    arrays, and iterates over its histograms. For JAX it is a pytree.
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

    def __len__(self) -> int:
        """Return the number of histograms along the first axis of the batch."""
        if np.ndim(self.value) == 0:
            raise TypeError("this Threshold belongs to one histogram; only that of a batch has a length")
        return int(self.value.shape[0])

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, index: Any) -> "Threshold":
        """Return the threshold of a histogram, or of a part of the batch."""
        if np.ndim(self.value) == 0:
            raise TypeError("this Threshold belongs to one histogram; its fields are named: `value`, `index` ...")
        return Threshold(*(part_of(field, index) if np.ndim(field) else field for field in fields_of(self)))

    def __iter__(self) -> "Iterator[Threshold]":
        return (self[k] for k in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Threshold):
            return NotImplemented
        return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(fields_of(self), fields_of(other), strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        fields = fields_of(self)
        if not is_concrete(*fields) or not all(is_array(field) or np.isscalar(field) for field in fields):
            return f"Threshold(value={self.value}, ...)"  # while JAX traces, or a pytree of something else
        if (shape := np.shape(self.value)) != ():
            low, high = (f"{limit(self.value):.6g}" for limit in (np.min, np.max))
            return f"Threshold(batch of shape {shape}, value={low} .. {high})"
        quality = f"clipped={float(self.clipped):.4%}, sqnr_db={float(self.sqnr_db):.1f}"
        if int(self.index) < 0:
            return f"Threshold(value={float(self):.6g}, {quality})"
        divergence = "" if np.isnan(self.divergence) else f", divergence={float(self.divergence):.4g}"
        return f"Threshold(value={float(self):.6g}, index={int(self.index)}{divergence}, {quality})"

    def _repr_html_(self) -> str | None:
        """Return a table for notebooks, with a row for each histogram; None while JAX traces."""
        if not is_concrete(*fields_of(self)):
            return None
        shown = fields_of(self)[: len(_COLUMNS)]
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


register_record(Threshold)


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
    counts, edges_64 = hist.astype(xp.float64), xp.asarray(in_float64(edges, xp=xp), xp.float64)
    low, high, wide = edges_64[:-1], edges_64[1:], value.astype(xp.float64)
    width = high - low
    beyond = xp.clip((high - wide) / width, 0, 1) + xp.clip((-wide - low) / width, 0, 1)
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
        *(tie.astype(exact.dtype)[()] for tie in tuple(ties) or (xp.asarray(xp.nan, xp.float64),) * 2),
    )


def check_found(threshold: Threshold, what: str) -> Threshold:
    """Raise InfeasibleError if a threshold is missing, unless JAX traces and the values are unknown."""
    if is_concrete(threshold.value):
        missing = np.isnan(np.asarray(threshold.value, dtype=np.float64))
        if missing.any():
            where = f" (histograms {np.flatnonzero(missing)[:10].tolist()} of the batch)" if missing.ndim else ""
            raise InfeasibleError(f"`hist` must have {what}{where}")
    return threshold
