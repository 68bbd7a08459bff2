"""The only file that knows NumPy and JAX apart.

A *namespace* (``xp``) is ``numpy`` or ``jax.numpy``. Kernels take it as a keyword and are written once in the
words both share; :func:`compiled` runs them as they are on NumPy and under a cached ``jax.jit`` with 64-bit
types on JAX. JAX is never imported here: an array of its can only exist once somebody else has imported it.
"""

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeAlias, TypeVar

import numpy as np

from klquant.errors import ArrayTypeError

Array: TypeAlias = Any  # a NumPy or JAX array: they have no static type in common
_Result = TypeVar("_Result")
_State = TypeVar("_State")


def array_namespace(**arrays: Array) -> ModuleType:
    """Return the one namespace that all arrays (named, for the message) belong to, or raise ArrayTypeError."""
    namespaces = {name: _namespace_of(name, array) for name, array in arrays.items()}
    if len(set(namespaces.values())) > 1:
        got = ", ".join(f"`{name}` from {xp.__name__.partition('.')[0]}" for name, xp in namespaces.items())
        raise ArrayTypeError(f"all arrays must come from one library, got {got}; convert one of them first")
    return next(iter(namespaces.values()))


def _namespace_of(name: str, array: Array) -> ModuleType:
    if isinstance(array, (np.ndarray, np.generic)):
        return np
    if "jax" in sys.modules and isinstance(array, sys.modules["jax"].Array):
        return sys.modules["jax.numpy"]
    kind = f"{type(array).__module__}.{type(array).__qualname__}".removeprefix("builtins.")
    hint = "wrap it in np.asarray(...)"
    if kind.startswith("torch."):
        hint = "for torch models use klquant.backends.torch, for a single tensor pass tensor.numpy(force=True)"
    raise ArrayTypeError(f"`{name}` must be a NumPy or JAX array, got {kind}; {hint}")


def is_concrete(*arrays: Array) -> bool:
    """Tell whether the values can be looked at: not so for tracers inside ``jax.jit`` or ``jax.vmap``."""
    return "jax" not in sys.modules or not any(isinstance(a, sys.modules["jax"].core.Tracer) for a in arrays)


def compiled(kernel: Callable[..., _Result]) -> Callable[..., _Result]:
    """Wrap ``kernel(*arrays, xp=..., **static)`` so that it is called as ``wrapped(*arrays, **static)``.

    ``static`` must be hashable: JAX compiles once per value and per shape.
    """

    @functools.cache
    def jitted(static: tuple[tuple[str, Any], ...]) -> Callable[..., _Result]:
        jax = sys.modules["jax"]
        function: Callable[..., _Result] = jax.jit(functools.partial(kernel, xp=jax.numpy, **dict(static)))
        return function

    @functools.wraps(kernel)
    def call(*arrays: Array, **static: Any) -> _Result:
        if array_namespace(**{f"argument {k}": a for k, a in enumerate(arrays)}) is np:
            with np.errstate(all="ignore"):  # kernels mask what is undefined
                return kernel(*arrays, xp=np, **static)
        with enable_x64():
            return jitted(tuple(sorted(static.items())))(*arrays)

    return call


def enable_x64() -> Any:
    """Return JAX's context manager for 64-bit types; the global configuration stays as it is."""
    jax = sys.modules["jax"]
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return __import__("jax.experimental").experimental.enable_x64()


def from_numpy(array: np.ndarray, *, xp: ModuleType) -> Array:
    """Return `array` in the namespace with its dtype, 64-bit or not."""
    if xp is np:
        return array
    with enable_x64():
        return xp.asarray(array)


def bincount(index: Array, length: int, *, xp: ModuleType) -> Array:
    """Count how often each of 0 .. length - 1 occurs; int64, shape (length,)."""
    if xp is np:
        return np.bincount(index, minlength=length).astype(np.int64, copy=False)
    return xp.bincount(index, length=length)


def map_blocks(function: Callable[[Array], Array], blocks: Array, needed: Array, *, xp: ModuleType) -> Array:
    """Stack ``function(block)`` over the rows of ``blocks``; rows not ``needed`` cost nothing and give zeros."""
    if xp is np:
        skipped = np.zeros(blocks.shape[1:])
        return np.stack([function(block) if need else skipped for block, need in zip(blocks, needed, strict=True)])
    lax = sys.modules["jax"].lax

    def row(item: tuple[Array, Array]) -> Array:
        block, need = item
        return lax.cond(need, function, lambda b: xp.zeros(b.shape, xp.float64), block)

    return lax.map(row, (blocks, needed))


def while_loop(
    unfinished: Callable[[_State], Array], step: Callable[[_State], _State], state: _State, *, xp: ModuleType
) -> _State:
    """Apply ``step`` as long as ``unfinished`` holds."""
    if xp is not np:
        result: _State = sys.modules["jax"].lax.while_loop(unfinished, step, state)
        return result
    while unfinished(state):
        state = step(state)
    return state
