"""From a function and its arguments to its jaxpr and the products in it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr

from .arguments import Function, Static, array_paths, split
from .names import name_sites
from .sites import Path, Site, find_sites


class Program(NamedTuple):
    """A function traced for arguments of certain shapes."""

    jaxpr: ClosedJaxpr
    num_params: int
    """Its first arguments are the arrays of the parameters."""
    sites: Mapping[Path, Site]
    """The products that may be quantized."""
    opaque: Mapping[str, str]
    """Products that may not, and why, by name."""
    result: Any
    """The structure of what the function returns."""

    @property
    def named(self) -> dict[str, Site]:
        """Return the sites by name."""
        return {site.name: site for site in self.sites.values()}

    @property
    def tensors(self) -> list[str]:
        """Return the names of all operands that are activations."""
        return [name for site in self.sites.values() for name in site.tensors.values()]


def trace(function: Function, static: tuple[Static, Static], params: Sequence[Any], inputs: Sequence[Any]) -> Program:
    """Return the program of ``function(params, *inputs)``; the arrays may be tracers or shapes."""

    def flat(params: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        result = function(static[0].filled(params), *static[1].filled(inputs))
        leaves, structure = jax.tree.flatten(result)
        structures.append(structure)
        return leaves

    structures: list[Any] = []
    jaxpr = jax.make_jaxpr(flat)(list(params), list(inputs))
    sites, opaque = find_sites(jaxpr, _paths(static[0], params))
    names = name_sites([*sites.values(), *opaque])
    named = {path: site._replace(name=name) for (path, site), name in zip(sites.items(), names, strict=False)}
    reasons = dict(zip(names[len(sites) :], (site.reason for site in opaque), strict=True))
    return Program(jaxpr, len(params), named, reasons, structures[0])


def program_of(function: Function, params: Any, inputs: tuple[Any, ...]) -> Program:
    """Return the program of a function of these arguments; the arrays may be shapes."""
    own, given = split(params), split(inputs)
    return trace(function, (own.static, given.static), own.arrays, given.arrays)


def _paths(static: Static, arrays: Sequence[Any]) -> list[str]:
    return array_paths(static.filled([np.empty(0)] * len(arrays)))
