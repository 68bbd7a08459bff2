"""The only file with separate code for NumPy and JAX.

A *namespace* (``xp``) is ``numpy`` or ``jax.numpy``. A kernel takes it as a keyword, and is written once with the
functions that both have. :func:`compiled` runs a kernel directly on NumPy arrays, and on JAX arrays whose values lie in
the memory of the CPU: compiling takes seconds, the kernel milliseconds. Tracers, and arrays on an accelerator or on
several devices, go through a cached ``jax.jit`` with 64-bit types. JAX is never imported here: if an argument is a JAX
array, the caller has imported it already.
"""

import contextlib
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

from klquant.errors import ArrayTypeError

Array: TypeAlias = Any  # a NumPy or JAX array; they share no static type
_Result = TypeVar("_Result")
_State = TypeVar("_State")
ACCELERATOR_BATCH = 256
CHUNK = 2**16
BLOCK_ROWS, BLOCK_TERMS = 128, 32
MANTISSA_BITS, EXPONENT_BIAS = 52, 1023  # of float64
_RECORDS: list[type] = []  # filled when klquant is imported


def array_namespace(**arrays: Array) -> ModuleType:
    """Return the namespace of all arrays, or raise ArrayTypeError. The keywords are their names in the message."""
    if "jax" in sys.modules:
        _register_pytrees()
    namespaces = {name: _namespace_of(name, array) for name, array in arrays.items()}
    if len(set(namespaces.values())) > 1:
        got = ", ".join(f"`{name}` from {xp.__name__.partition('.')[0]}" for name, xp in namespaces.items())
        raise ArrayTypeError(f"all arrays must come from one library, got {got}; convert one of them first")
    return next(iter(namespaces.values()))


def register_record(kind: type) -> None:
    """Register a dataclass of arrays as a pytree once JAX has been imported."""
    _RECORDS.append(kind)


@functools.cache
def _register_pytrees() -> None:
    for kind in _RECORDS:
        names = [field.name for field in dataclasses.fields(kind)]
        sys.modules["jax"].tree_util.register_dataclass(kind, data_fields=names, meta_fields=[])


def fields_of(record: Any) -> tuple[Array, ...]:
    """Return the fields of a dataclass, in order."""
    return tuple(getattr(record, field.name) for field in dataclasses.fields(record))


def part_of(array: Array, index: Any) -> Array:
    """Return ``array[index]``. JAX would warn about 64-bit types if they are switched off."""
    if not hasattr(array, "devices"):
        return array[index]
    with enable_x64():
        return array[index]


def _namespace_of(name: str, array: Array) -> ModuleType:
    if isinstance(array, (np.ma.MaskedArray, np.matrix)):
        hint = "array.compressed() or array.filled(...)" if isinstance(array, np.ma.MaskedArray) else "np.asarray(...)"
        kind = type(array).__name__
        raise ArrayTypeError(f"`{name}` must be a plain NumPy array, got numpy.{kind}; convert it with {hint}")
    if isinstance(array, (np.ndarray, np.generic)):
        return np
    if "jax" in sys.modules and isinstance(array, sys.modules["jax"].Array):
        return sys.modules["jax.numpy"]
    kind = f"{type(array).__module__}.{type(array).__qualname__}".removeprefix("builtins.")
    hint = "wrap it in np.asarray(...)"
    if kind.endswith("._result.Threshold"):
        hint = "take its `value`, or for a quantizer klquant.scale(threshold)"
    if kind.startswith("torch."):
        hint = "for torch models use klquant.backends.torch, for a single tensor pass tensor.numpy(force=True)"
    raise ArrayTypeError(f"`{name}` must be a NumPy or JAX array, got {kind}; {hint}")


def is_array(value: object) -> bool:
    """Return whether `value` is a NumPy or JAX array."""
    return isinstance(value, np.ndarray) or ("jax" in sys.modules and isinstance(value, sys.modules["jax"].Array))


def is_concrete(*arrays: Array) -> bool:
    """Return whether the values are known: those of tracers inside ``jax.jit`` or ``jax.vmap`` are not."""
    return "jax" not in sys.modules or not any(isinstance(a, sys.modules["jax"].core.Tracer) for a in arrays)


def compiled(
    kernel: Callable[..., _Result], *, by_row: bool = False, elementwise: bool = True
) -> Callable[..., _Result]:
    """Return a function ``(*arrays, **static)`` that calls ``kernel(*arrays, xp=..., **static)``.

    ``static`` must be hashable. Where JAX compiles, it does so once for each value of it and each shape. A kernel that
    works `by_row` gives a result for each row of its first array. If the rows are spread over several devices, each
    device computes its own rows. Other kernels that are not `elementwise` let XLA decide what a device computes. If the
    mesh has explicit axes, each device then gets the whole result.
    """

    def on_numpy(*arrays: Array, **static: Any) -> _Result:
        with np.errstate(all="ignore"):  # kernels mask undefined results
            return kernel(*arrays, xp=np, **static)

    @functools.cache
    def jitted(static: tuple[tuple[str, Any], ...], rows: _Rows | None, whole: Any) -> Callable[..., _Result]:
        jax = sys.modules["jax"]
        function = functools.partial(kernel, xp=jax.numpy, **dict(static))
        if rows:
            function = jax.shard_map(function, mesh=rows.mesh, in_specs=rows.arguments, out_specs=rows.results)
        elif whole:
            function = jax.sharding.auto_axes(function, out_sharding=whole)
        wrapped: Callable[..., _Result] = jax.jit(function)
        return wrapped

    @functools.wraps(kernel)
    def call(*arrays: Array, **static: Any) -> _Result:
        if array_namespace(**{f"argument {k}": a for k, a in enumerate(arrays)}) is np:
            return on_numpy(*arrays, **static)
        jax, rows = sys.modules["jax"], _spread_rows(arrays) if by_row else None
        whole = None if elementwise and not by_row else _on_all_devices(arrays)
        at_once = is_concrete(*arrays) and not rows  # also where JAX traces a function with constants
        with jax.ensure_compile_time_eval() if at_once else contextlib.nullcontext():
            if (cpu := _only_cpu(arrays)) is not None:
                return _to_jax(on_numpy(*map(np.asarray, arrays), **static), arrays, cpu)
            with enable_x64(), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                return jitted(tuple(sorted(static.items())), rows, whole)(*arrays)

    return call


class _Rows(NamedTuple):
    """How the rows of a batch are spread over devices."""

    mesh: Any
    arguments: tuple[Any, ...]
    results: Any


def _spread_rows(arrays: tuple[Array, ...]) -> _Rows | None:
    first = arrays[0]
    sharding = first.sharding if is_concrete(*arrays) else _explicit_sharding(first)
    spec = getattr(sharding, "spec", None) if first.ndim > 1 else None
    if not spec or (len(spec) == first.ndim and spec[-1] is not None) or not any(spec):
        return None
    rows = type(spec)(*spec[: first.ndim - 1])
    return _Rows(sharding.mesh, tuple(rows if a.ndim == first.ndim else type(spec)() for a in arrays), rows)


def _explicit_sharding(tracer: Array) -> Any:
    """Return the sharding of a tracer, known if its mesh has explicit axes; else None."""
    sharding = getattr(sys.modules["jax"].typeof(tracer), "sharding", None)
    kinds = getattr(getattr(sharding, "mesh", None), "axis_types", None) or ()
    return sharding if sys.modules["jax"].sharding.AxisType.Explicit in kinds else None


def _on_all_devices(arrays: tuple[Array, ...]) -> Any:
    """Return the sharding of a result that each device of the mesh has, if that mesh has explicit axes; else None."""
    jax = sys.modules["jax"]
    shardings = filter(None, map(_explicit_sharding, arrays))
    return next((jax.sharding.NamedSharding(s.mesh, jax.sharding.PartitionSpec()) for s in shardings), None)


def _only_cpu(arrays: tuple[Array, ...]) -> Any:
    """Return the CPU device that holds the values of all these JAX arrays; None if there is no such device."""
    if not is_concrete(*arrays):
        return None
    devices = {device for array in arrays for device in array.devices()}
    return next(iter(devices)) if len(devices) == 1 and next(iter(devices)).platform == "cpu" else None


def _to_jax(result: _Result, arrays: tuple[Array, ...], device: Any) -> _Result:
    """Return NumPy results as JAX arrays, bound to the device if one of the arguments is, as from ``jax.jit``."""
    bound = device if any(array.committed for array in arrays) else None
    with enable_x64():
        moved: _Result = sys.modules["jax"].device_put(result, bound)
    return moved


def enable_x64() -> Any:
    """Return JAX's context manager for 64-bit types. The global configuration does not change."""
    jax = sys.modules["jax"]
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return __import__("jax.experimental").experimental.enable_x64()


def scalar_argument(name: str, value: Array | float, **array: Array) -> Array:
    """Return a checked number for a kernel with this array: a float as float64, and a tracer as it is."""
    if is_concrete(value):
        return from_numpy(np.asarray(value, np.float64), xp=array_namespace(**array))
    array_namespace(**array, **{name: value})
    return value


def from_numpy(array: np.ndarray, *, xp: ModuleType) -> Array:
    """Return `array` as an array of the namespace with the same dtype, also if that has 64 bits."""
    if xp is np:
        return array
    with enable_x64(), sys.modules["jax"].ensure_compile_time_eval():
        return xp.asarray(array)


def in_float64(x: Array, *, xp: ModuleType) -> Array:
    """Return floating-point numbers as float64, and integers as they are.

    XLA computes with 0 in place of a subnormal number on a CPU, NumPy does not. So these are made from their bits. A
    subnormal float64 becomes the smallest normal number, which is not 0 either.
    """
    if x.dtype.kind in "iub":
        return x
    if xp is np:
        return x.astype(np.float64, copy=False)
    kind = xp.finfo(x.dtype)
    bits = sys.modules["jax"].lax.bitcast_convert_type(x, f"int{kind.bits}").astype(xp.int64)
    digits = bits & (2 ** (kind.bits - 1) - 1)
    small = (xp.minimum(digits, 1) if kind.bits == 64 else digits).astype(xp.float64)
    small = small * max(2.0 ** (kind.minexp - kind.nmant), 2.0**-1022)
    return xp.where(digits < 2**kind.nmant, xp.where(bits < 0, -small, small), x.astype(xp.float64))


def binary_exponent(x: Array, *, xp: ModuleType) -> Array:
    """Return the e with 2**(e - 1) <= x < 2**e, for float64 x. For 0, NaN and numbers below 2**-1022 it has no meaning.

    JAX 0.12 expands its own ``frexp`` and ``ldexp`` when it lowers a jitted function, after 64 bits were switched off.
    """
    if xp is np:
        return np.frexp(x)[1]
    bits = sys.modules["jax"].lax.bitcast_convert_type(x, xp.int64)
    return (bits >> MANTISSA_BITS) - (EXPONENT_BIAS - 1)


def power_of_two(exponent: Array, *, xp: ModuleType) -> Array:
    """Return 2.0**exponent, exactly, for integers -1022 .. 1023."""
    if xp is np:
        return np.ldexp(1.0, exponent)
    return sys.modules["jax"].lax.bitcast_convert_type((exponent + EXPONENT_BIAS) << MANTISSA_BITS, xp.float64)


def count_truncated(x: Array, factor: Array, limit: int, *, clip: bool, xp: ModuleType) -> Array:
    """Count how often ``x * factor``, rounded towards 0, takes each value in -limit .. limit.

    Return int64 counts of shape (2 * limit + 1,). With `clip`, values beyond a limit count as that limit. Without it,
    no value may be beyond. NumPy works in chunks that stay in the cache, with buffers that are allocated once.
    """
    length = 2 * limit + 1
    if xp is not np:
        steps = in_float64(x, xp=xp).astype(xp.float64) * factor
        steps = xp.clip(steps, -limit, limit) if clip else steps
        return xp.bincount(steps.astype(xp.int64) + limit, length=length)
    total = np.zeros(length, np.int64)
    size = min(CHUNK, x.shape[0])
    products, whole, index = np.empty(size), np.empty(size, np.int32), np.empty(size, np.intp)
    for begin in range(0, x.shape[0], CHUNK):
        part = slice(min(CHUNK, x.shape[0] - begin))
        products[part] = x[begin : begin + CHUNK]
        np.multiply(products[part], factor, out=products[part])
        if clip:
            np.clip(products[part], -limit, limit, out=products[part])
        whole[part] = products[part]
        np.add(whole[part], limit, out=index[part])
        total += np.bincount(index[part], minlength=length)
    return total


def each_row(function: Callable[..., Array], *tables: Array, xp: ModuleType) -> Array:
    """Return ``function(*rows)`` for the first row of each table, the second and so on, stacked."""
    if xp is np or tables[0].shape[0] == 1:
        return xp.stack([function(*rows) for rows in zip(*tables, strict=True)])
    return sys.modules["jax"].vmap(function)(*tables)


def stack_rows(rows: list[Array], *, xp: ModuleType) -> Array:
    """Return ``stack(rows)``. XLA computes up to eight rows in one kernel, more in one for each: so two at a time."""
    if xp is np or len(rows) % 2:
        return xp.stack(rows)
    return xp.stack([xp.stack(rows[::2]), xp.stack(rows[1::2])], axis=1).reshape(len(rows), -1)


def running_sums(table: Array, padding: int = 0, *, xp: ModuleType) -> Array:
    """Return the sums of the first 0, 1, 2 ... entries of each row, and then its total `padding` more times.

    They are summed within blocks of sqrt(n) entries and then over the blocks. So an entry is the result of 2 sqrt(n)
    roundings in a row, not n. Behind a huge entry each of them costs digits. On a CPU JAX adds in the same order, which
    is several times faster there than its own ``cumsum``.
    """
    rows, entries = table.shape
    length = 1 + entries + padding
    size = math.isqrt(length - 1) + 1
    padded = _padded(table, 1, size * size - 1 - entries, xp=xp)
    if xp is np and table.dtype.kind == "i":
        return np.cumsum(padded[:, :length], axis=1)  # exact in any order
    inner = _cumsum(padded.reshape(rows, size, size), xp=xp)
    return (inner + _sums_before(inner[:, :, -1], xp=xp)[:, :, None]).reshape(rows, -1)[:, :length]


def _padded(table: Array, before: int, after: int, *, xp: ModuleType) -> Array:
    """Return the rows with zeros before and after them. XLA merges its own operator for that with others."""
    if xp is not np:
        zero = xp.zeros((), table.dtype)
        return sys.modules["jax"].lax.pad(table, zero, ((0, 0, 0), (before, after, 0)))
    padded = np.zeros((table.shape[0], before + table.shape[1] + after), table.dtype)
    padded[:, before : before + table.shape[1]] = table
    return padded


def _cumsum(table: Array, *, xp: ModuleType) -> Array:
    if xp is np:
        return np.cumsum(table, axis=-1)
    lax = sys.modules["jax"].lax

    def add(k: Array, table: Array) -> Array:
        before, here = (lax.dynamic_index_in_dim(table, j, axis=-1) for j in (k - 1, k))
        return lax.dynamic_update_index_in_dim(table, before + here, k, axis=-1)

    def one_by_one(table: Array) -> Array:
        first, end = (xp.asarray(k, xp.int32) for k in (1, table.shape[-1]))
        return lax.fori_loop(first, end, add, table)  # 32 bits: lowered under `vmap` after 64 bits were switched off

    return lax.platform_dependent(table, cpu=one_by_one, default=lambda table: xp.cumsum(table, axis=-1))


def _sums_before(table: Array, *, xp: ModuleType) -> Array:
    """Return the sum of all entries before each one, in its row."""
    return _cumsum(_padded(table[:, :-1], 1, 0, xp=xp), xp=xp)


def slice_at(table: Array, begin: Array, length: int, *, xp: ModuleType) -> Array:
    """Return ``table[:, begin : begin + length]``, where `begin` may be traced."""
    if xp is np:
        return table[:, begin : begin + length]
    return sys.modules["jax"].lax.dynamic_slice(table, (0, begin), (table.shape[0], length))


def empty_rows(number: int, length: int, *, xp: ModuleType) -> tuple[Array, list[dict[str, Array]]]:
    """Return a table, and for each of its rows the keyword with which an operation writes its result there.

    JAX has no such keyword, so its table is None.
    """
    if xp is not np:
        return None, [{}] * number
    table = np.empty((number, length))
    return table, [{"out": row} for row in table]


def strided_sums(rows: Array, stride: Array, length: int, count: int, *, xp: ModuleType) -> Array:
    """Return ``sum_j row[t + j * stride]`` over j < length for t < count, shape (len(rows), count).

    For JAX `rows` is a list. For NumPy it is a table, and the length of its rows a multiple of the stride.
    """
    if xp is np:
        table = rows.reshape(len(rows), -1, stride)
        return np.matmul(_band(table.shape[1] - length + 1, length), table).reshape(len(rows), -1)[:, :count]
    lax = sys.modules["jax"].lax
    rows = lax.optimization_barrier(rows)  # or XLA recomputes them for every j
    steps = min(range(15, 7, -1), key=lambda number: length % number)  # that are unrolled; for 253: 11

    def add(begin: Array, totals: list[Array], steps: int) -> list[Array]:
        for j in range(steps):
            parts = (lax.dynamic_slice(row, ((begin + j) * stride,), (count,)) for row in rows)
            totals = [total + part for total, part in zip(totals, parts, strict=True)]
        return totals

    rest = length % steps
    totals = add(0, [xp.zeros_like(row, shape=count) for row in rows], rest)  # under shard_map: as varying as the row
    if length >= steps:
        totals = lax.fori_loop(0, length // steps, lambda k, totals: add(rest + k * steps, totals, steps), totals)
    return xp.stack(totals)


@functools.lru_cache(maxsize=256)
def _band(rows: int, length: int) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Return a matrix of 0 and 1 whose row k sums the rows k .. k + length - 1 of a table."""
    shift = np.arange(rows + length - 1) - np.arange(rows)[:, None]
    return ((shift >= 0) & (shift < length)).astype(np.float64)


def fixed_shapes(*, xp: ModuleType) -> bool:
    """Return whether each new shape costs a compilation."""
    return xp is not np


def map_rows(function: Callable[..., Array], table: Sequence[tuple[int, ...]], *, xp: ModuleType) -> Array:
    """Return the two-dimensional ``function(*row)`` for each row of integers, joined along the second axis."""
    if xp is np:
        return np.concatenate([function(*row) for row in table], axis=1)
    found = xp.moveaxis(sys.modules["jax"].lax.map(lambda row: function(*row), xp.asarray(table)), 0, 1)
    return found.reshape(found.shape[0], -1)


def first_true(mask: Array, *, xp: ModuleType) -> Array:
    """Return the index of the first True, or the length if there is none."""
    return first_and_number(mask, xp=xp)[0]


def first_and_number(mask: Array, *, xp: ModuleType) -> tuple[Array, Array]:
    """Return the index of the first True, or the length if there is none, and the number of them."""
    length = mask.shape[0]
    if xp is np:
        number = np.count_nonzero(mask)
        return np.int64(mask.argmax() if number else length), np.int64(number)
    lax, start = sys.modules["jax"].lax, (xp.asarray(length, xp.int64), xp.asarray(0, xp.int64))
    entries = (xp.where(mask, xp.arange(length), length), mask.astype(xp.int64))
    found = lax.reduce(entries, start, lambda a, b: (lax.min(a[0], b[0]), a[1] + b[1]), (0,))
    both: tuple[Array, Array] = lax.optimization_barrier(found)
    return both


def least(x: Array, axis: int = 0, *, xp: ModuleType) -> Array:
    """Return the minimum of floating-point numbers; NaN if one of them is NaN."""
    return x.min(axis=axis) if xp is np else -most(-x, axis, xp=xp)


def most(x: Array, axis: int = 0, *, xp: ModuleType) -> Array:
    """Return the maximum of floating-point numbers; NaN if one of them is NaN.

    On a CPU XLA splits a reduction into three kernels, which takes long to compile, unless it has two results: here the
    sum, which nobody needs.
    """
    if xp is np:
        return x.max(axis=axis)
    lax, start = sys.modules["jax"].lax, (np.zeros((), x.dtype), np.asarray(-np.inf, x.dtype))
    found = lax.reduce((x, x), start, lambda a, b: (a[0] + b[0], lax.max(a[1], b[1])), (axis,))
    return lax.optimization_barrier(found)[1]


def at_most(limit: int, value: Callable[[], Array], *, xp: ModuleType) -> int:
    """Return min(limit, value()) with NumPy. JAX must fix shapes before it knows the value, so it gets the limit."""
    return min(limit, int(value())) if xp is np else limit


def nonzero_positions(values: Array, before: Array, *, xp: ModuleType) -> Array:
    """Return the positions of the non-zero `values`, in order, given the number of non-zeros `before` each entry.

    With JAX the result is padded with zeros to the length of `values`. Its own ``nonzero`` would count them again.
    """
    if xp is np:
        return np.flatnonzero(values)
    length = values.shape[0]
    target = xp.where(values != 0, before, length)
    return xp.zeros(length, xp.int64).at[target].set(xp.arange(length), mode="drop")


def where_needed(
    needed: Array, function: Callable[[], Array], otherwise: Callable[[], Array], *, xp: ModuleType
) -> Array:
    """Return ``function()`` if `needed`, else ``otherwise()``, and call only that one."""
    if xp is np:
        return function() if needed else otherwise()
    return sys.modules["jax"].lax.cond(needed, function, otherwise)


def sum_selected(
    function: Callable[[Array, Array, int], Array], selected: Array, sizes: Array, room: int, *, xp: ModuleType
) -> Array:
    """Return the sum of ``function(indices, begin, number)`` over terms 0 .. size - 1 of the `selected` indices.

    The function adds up terms begin .. begin + number - 1, and those beyond a size must be 0. Results for other indices
    mean nothing. `sizes` never decrease. NumPy takes as many indices at a time as have `room` terms together, JAX
    ``BLOCK_ROWS`` indices in a row and ``BLOCK_TERMS`` terms.
    """
    length = selected.shape[0]
    if xp is np:
        result, chosen = np.zeros(length), np.flatnonzero(selected)
        while len(chosen):
            largest = int(sizes[chosen[-1]])
            chosen, block = np.split(chosen, [-(room // largest + 1)])
            result[block] = function(block, np.int64(0), largest)
        return result
    rows = -(-length // -(-length // BLOCK_ROWS))
    blocks = np.minimum(np.arange(-(-length // rows) * rows), length - 1).reshape(-1, rows)
    tiles = xp.ceil(most(xp.where(selected, sizes, 0.0)[blocks], axis=1, xp=xp) / BLOCK_TERMS).astype(xp.int64)
    before = _sums_before(tiles[None], xp=xp)[0]

    def add(k: Array, result: Array) -> Array:
        block = first_true(before + tiles > k, xp=xp)
        terms = function(xp.asarray(blocks)[block], (k - before[block]) * BLOCK_TERMS, BLOCK_TERMS)
        return result.at[block].add(terms)

    zeros = xp.zeros_like(sizes, dtype=xp.float64, shape=blocks.shape)  # under shard_map: as varying as the sizes
    return repeat(add, before[-1] + tiles[-1], zeros, xp=xp).reshape(-1)[:length]


def repeat(
    step: Callable[[Any, _State], _State],
    number: Array | int,
    state: _State,
    *,
    needed: Callable[[_State], Array] = lambda state: True,
    xp: ModuleType,
) -> _State:
    """Return the state after ``state = step(k, state)`` for k = 0, 1 ... number - 1, which JAX compiles once.

    Where a step is not `needed` any more, it must leave the state as it is. NumPy then stops after the first step.
    """
    if xp is not np:
        last: _State = sys.modules["jax"].lax.fori_loop(0, number, step, state)
        return last
    for k in range(int(number)):
        if k > 0 and not needed(state):
            break
        state = step(k, state)
    return state


def map_batch(function: Callable[[Array, Array], _Result], hist: Array, edges: Array, *, xp: ModuleType) -> _Result:
    """Apply ``function(hist, edges)`` to each histogram of a batch, one at a time, so that memory does not grow.

    The function gets weights as float64, and integer counts as they are.
    `hist` has shape (..., num_bins), and `edges` has the same leading shape or none. On an accelerator JAX takes
    ``ACCELERATOR_BATCH`` histograms at a time.
    """

    def one(hist: Array, edges: Array) -> _Result:
        return function(in_float64(hist, xp=xp), edges)

    if hist.ndim == 1:
        return one(hist, edges)
    shape = hist.shape[:-1]
    rows = hist.reshape(-1, hist.shape[-1])
    ranges = xp.broadcast_to(edges, (*shape, edges.shape[-1])).reshape(-1, edges.shape[-1])
    if xp is np:
        result: _Result = _stack([one(row, bounds) for row, bounds in zip(rows, ranges, strict=True)], shape)
        return result
    jax = sys.modules["jax"]
    size = None if jax.default_backend() == "cpu" else ACCELERATOR_BATCH
    mapped = jax.lax.map(lambda row: one(*row), (rows, ranges), batch_size=size)
    reshaped: _Result = jax.tree.map(lambda field: field.reshape(*shape, *field.shape[1:]), mapped)
    return reshaped


def _stack(found: list[Any], shape: tuple[int, ...]) -> Any:
    if dataclasses.is_dataclass(found[0]):
        columns = zip(*map(fields_of, found), strict=True)
        kind: Any = type(found[0])
        return kind(*(np.stack(column).reshape(shape) for column in columns))
    return np.stack(found).reshape(*shape, -1)
