"""Arguments of a function: arrays, which are traced, and everything else, which is static."""

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from klquant.errors import InvalidInputError

Function: TypeAlias = Callable[..., Any]
"""A function ``f(params, *inputs)``."""
_TRACED = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)


class Static(NamedTuple):
    """A pytree without its arrays; hashable if its own parts are."""

    tree: Any
    others: tuple[Any, ...]
    """The leaves; None where an array belongs."""
    arrays: tuple[bool, ...]
    """Which leaves are arrays."""

    def filled(self, arrays: Sequence[Any]) -> Any:
        """Return the pytree with these arrays."""
        following = iter(arrays)
        leaves = [next(following) if is_array else other for other, is_array in zip(self.others, self.arrays)]  # noqa: B905
        return jax.tree.unflatten(self.tree, leaves)


class Split(NamedTuple):
    """A pytree in two parts."""

    arrays: list[Any]
    static: Static


def split(tree: Any) -> Split:
    """Return the arrays of a pytree, and the rest: functions, strings and Python's numbers stay as they are."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = tuple(isinstance(leaf, _TRACED) for leaf in leaves)
    others = tuple(None if is_array else leaf for leaf, is_array in zip(leaves, arrays, strict=True))
    return Split(
        [leaf for leaf, is_array in zip(leaves, arrays, strict=True) if is_array], Static(structure, others, arrays)
    )


def array_paths(tree: Any) -> list[str]:
    """Return where each array lies, as ``layers.0.weight``."""
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [".".join(map(_key, path)) for path, leaf in found if isinstance(leaf, _TRACED)]


def _key(entry: Any) -> str:
    return str(next(getattr(entry, name) for name in ("key", "name", "idx") if hasattr(entry, name)))


def inputs_of(batch: Any) -> tuple[Any, ...]:
    """Return the arguments in a batch: a tuple or list holds several, anything else is one."""
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


def split_inputs(inputs: Sequence[Any], options: Mapping[str, Any] = MappingProxyType({})) -> Split:
    """Return the arrays of the arguments beside the parameters, positional and by keyword, and the rest."""
    return split((tuple(inputs), dict(options)))


def applied(function: Function, static: tuple[Static, Static], params: Sequence[Any], inputs: Sequence[Any]) -> Any:
    """Return what a function makes of split arguments."""
    positional, options = static[1].filled(inputs)
    return function(static[0].filled(params), *positional, **options)


def on_arrays(run: Callable[..., Any], function: Function) -> Function:
    """Return ``run(static, params, inputs)`` of arrays, jitted, with the signature of `function`."""
    jitted = jax.jit(run, static_argnums=0, inline=True)  # inline: an export drops what it does not need

    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        bound = signature.bind(*args, **options)
        params, *inputs = bound.args
        own, given = split(params), split_inputs(inputs, bound.kwargs)
        return jitted((own.static, given.static), own.arrays, given.arrays)

    return call


def jitted(function: Function) -> Function:
    """Return a function jitted, whatever its arguments hold beside arrays."""

    def run(static: tuple[Static, Static], params: Sequence[Any], inputs: Sequence[Any]) -> Any:
        return applied(function, static, params, inputs)

    return on_arrays(run, function)


def check_function(function: Any) -> None:
    """Raise InvalidInputError for anything that cannot be called."""
    if not callable(function):
        raise InvalidInputError(f"`f` must be a function f(params, *inputs), got {type(function).__name__}")


def as_numpy(array: Any) -> "np.ndarray[Any, Any]":
    """Return the values of an array, also of random keys."""
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(array) if is_key else array)


def digest_of(tree: Any) -> str:
    """Return a hash of the values in a pytree."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, _TRACED):
            digest.update(np.ascontiguousarray(as_numpy(leaf)).tobytes())
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()
