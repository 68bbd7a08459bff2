"""Range and histogram of a tensor, computed on its device: the very counts of :func:`klquant.histogram`.

NumPy finds the bin of a value in float64, which accelerators lack or emulate. But the bin grows with ``|x|``, so the
smallest value of each bin, in the dtype of the tensor, says the same. The host finds these exactly; the device takes
the bin that a product in that dtype gives, which is at most one off, and corrects it by comparison. What is too small
for a normal number counts as 0, as XLA may compute with it.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from klquant.errors import InvalidInputError

from ...collection import Bins, Counted
from ...collection.bins import Array
from ..kernels import wide_dtype


class Table(NamedTuple):
    """The bins to count in, for the device."""

    power: Array
    """A power of 2 that brings ``|x|`` near 1, so that no reciprocal is too small for a normal number."""
    steps: Array
    """The number of bins in ``1 / power``."""
    starts: Array
    """Smallest ``|x|`` of each bin from the centre, and infinity."""
    outside: Array
    """Smallest ``|x|`` beyond the bins."""


class Seen(NamedTuple):
    """What the device has seen of one tensor."""

    low: Any
    high: Any
    least: Any
    """The smallest max ``|x|`` of a call, among those that are not 0."""
    calls: Any
    counts: Any
    """Shape (num_bins,), int32; None where only the range is wanted."""
    zeros: Any
    beyond: Any


def table_of(bins: Bins, dtype: Any) -> Table:
    """Return the table of these bins for tensors of a dtype."""
    kind: np.dtype[Any] = np.dtype(wide_dtype(dtype))
    inner = Bins(3, 3 * math.nextafter(bins.amax, math.inf))  # as collection counts what lies beyond
    most = -np.finfo(kind.type).minexp
    power = math.ldexp(1.0, -max(-most, min(math.frexp(bins.amax)[1], most)))
    steps = bins.num_bins / (bins.amax * power)
    return Table(np.asarray(power, kind), np.asarray(steps, kind), _starts(bins, kind), _starts(inner, kind)[1])


def _starts(bins: Bins, kind: Any) -> Array:
    """Return the smallest value of each bin: that of bin k lies 2 k - 1 half bins from 0."""
    times, over = bins.half_bins
    halves = 2.0 * np.arange(1, bins.num_bins // 2 + 1) - 1
    with np.errstate(over="ignore", under="ignore"):
        found = (halves * over / times).astype(kind)
        for _ in range(4):  # rounding is off by one or two values
            below = np.nextafter(found, kind.type(0))
            found = np.where(below.astype(np.float64) * times / over >= halves, below, found)
            found = np.where(
                found.astype(np.float64) * times / over < halves, np.nextafter(found, kind.type(np.inf)), found
            )
    return np.concatenate([[0], np.maximum(found, np.finfo(kind).tiny), [np.inf]]).astype(kind)


def nothing(table: Table | None, dtype: Any) -> Seen:
    """Return what has been seen before the first call."""
    kind = wide_dtype(dtype)
    zero = np.int32(0)
    counts = None if table is None else np.zeros(2 * len(table.starts) - 3, np.int32)
    most = np.asarray(np.inf, kind)
    return Seen(most, -most, most, zero, counts, zero, zero)


def see(values: Any, table: Table | None, before: Seen) -> Seen:
    """Return what has been seen after one more call."""
    mesh = getattr(getattr(jax.typeof(values), "sharding", None), "mesh", None)
    if mesh is not None and jax.sharding.AxisType.Explicit in mesh.axis_types:
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())  # names the mesh: none may be set
        found: Seen = jax.sharding.auto_axes(_see, out_sharding=whole)(values, table, before)
        return found  # the compiler finds out how to spread the counting
    return _see(values, table, before)


def _see(values: Any, table: Table | None, before: Seen) -> Seen:
    values = values.astype(wide_dtype(values.dtype))
    if not values.size:
        return before._replace(calls=before.calls + 1)
    low, high = values.min(), values.max()
    amax = jnp.maximum(-low, high)
    found = before._replace(
        low=jnp.minimum(before.low, low),
        high=jnp.maximum(before.high, high),
        least=jnp.where(amax > 0, jnp.minimum(before.least, amax), before.least),
        calls=before.calls + 1,
    )
    if table is None:
        return found
    sizes = jnp.abs(values)
    return found._replace(
        counts=before.counts + _count(values, sizes, table),
        zeros=before.zeros + (values == 0).sum(dtype=jnp.int32),
        beyond=before.beyond + (sizes >= table.outside).sum(dtype=jnp.int32),
    )


def _count(values: Any, sizes: Any, table: Table) -> Any:
    half = table.starts.shape[0] - 2
    guess = sizes * table.power * table.steps / 2 + 0.5
    bins = jnp.clip(guess, 0, half).astype(jnp.int32)
    above, below = sizes >= table.starts[bins + 1], sizes < table.starts[bins]
    bins = bins + above.astype(jnp.int32) - below.astype(jnp.int32)
    numbers = half + jnp.where(values < 0, -bins, bins)
    return jnp.zeros(2 * half + 1, jnp.int32).at[numbers].add(1)


def counted(seen: Seen, bins: Bins) -> Counted:
    """Return the counts, as :mod:`klquant.backends.collection` wants them: in the bins, or those within and beyond."""
    counts = np.asarray(seen.counts).astype(np.int64)
    if counts.min() < 0:
        raise InvalidInputError("a batch must have fewer than 2**31 values of a tensor in a bin, got more")
    if bins.num_bins == len(counts):
        return Counted(counts, int(seen.zeros))
    beyond = int(seen.beyond)
    return Counted(np.array([beyond, counts.sum() - beyond, 0]), int(seen.zeros))


def packed(found: Mapping[str, Seen]) -> tuple[Any, Any]:
    """Return everything as two vectors, of ranges and of counts, so that few arrays cross to the host."""
    ranges = [bound for seen in found.values() for bound in (seen.low, seen.high, seen.least)]
    numbers = [
        jnp.concatenate(
            [jnp.stack([seen.calls, seen.zeros, seen.beyond]), *([] if seen.counts is None else [seen.counts])]
        )
        for seen in found.values()
    ]
    return jnp.stack(ranges), jnp.concatenate(numbers)


def unpacked(ranges: Any, numbers: Any, num_bins: Mapping[str, int]) -> dict[str, Seen]:
    """Return what :func:`packed` was given, on the host; `num_bins` is 0 for a tensor without counts."""
    sizes = [3 + number for number in num_bins.values()]
    parts = np.split(np.asarray(numbers), np.cumsum(sizes)[:-1])
    bounds = np.asarray(ranges).reshape(-1, 3).tolist()
    return {
        name: Seen(low, high, least, part[0], part[3:] if len(part) > 3 else None, part[1], part[2])
        for name, (low, high, least), part in zip(num_bins, bounds, parts, strict=True)
    }
