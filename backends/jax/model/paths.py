"""Paths of modules, from those of parameters, as ``blocks.0`` of ``params.blocks.0.kernel.value``; and name scopes."""

import re
from collections.abc import Iterable
from itertools import takewhile
from typing import Any

_VALUES = {"value", "raw_value"}  # the last part of a path in flax.nnx
_WEIGHTS = {"kernel", "weight", "weights", "w", "W", "embedding"}  # what comes before it, or is last elsewhere
_COLLECTIONS = {"params", "param"}  # the first part of a path in flax.linen
_NOT_NAMES = re.compile(r"(eqx|equinox)\.|.*->")  # scopes that equinox gives to classes, and jnp.einsum to its calls


def module_path(leaf: str) -> str:
    """Return the path of a module from that of its weight: ``Dense_0`` of ``params.Dense_0.kernel``."""
    parts = leaf.split(".")
    if parts[0] in _COLLECTIONS and len(parts) > 1:
        parts = parts[1:]
    for last in (_VALUES, _WEIGHTS):
        parts = parts[:-1] if len(parts) > 1 and parts[-1] in last else parts
    return ".".join(parts)


def parent_path(path: str) -> str:
    """Return the path of the module around another one; empty if there is none."""
    return path.rpartition(".")[0]


def common_path(paths: Iterable[str]) -> str:
    """Return the path of the innermost module around all of these."""
    levels = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, levels))


def scope_of(equation: Any) -> str:
    """Return the name scopes of an equation, without those of transformations, equinox and ``jnp.einsum``."""
    parts = getattr(equation.source_info.name_stack, "stack", ())
    names = [part.name for part in parts if type(part).__name__ == "Scope"]
    return "/".join(name for name in names if not _NOT_NAMES.match(name))
