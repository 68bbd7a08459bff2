"""From a function and its arguments to its jaxpr and the products in it."""

from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import zip_longest
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr

from klquant.errors import InvalidInputError

from .arguments import Function, Static, applied, array_paths, split, split_inputs
from .names import name_sites
from .sites import Path, Site, find_sites

_OTHERWISE = (
    ": a function that multiplies otherwise for other shapes, dtypes or flags must be quantized for each of them"
)


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
    def products(self) -> dict[str, str]:
        """Return what identifies each site beside its name, by name, in their order."""
        return {site.name: site.identity for site in self.sites.values()}

    @property
    def tensors(self) -> list[str]:
        """Return the names of all operands that are activations."""
        return [name for site in self.sites.values() for name in site.tensors.values()]


def trace(function: Function, static: tuple[Static, Static], params: Sequence[Any], inputs: Sequence[Any]) -> Program:
    """Return the program of ``function(params, *inputs)``; the arrays may be tracers or shapes."""

    def flat(params: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        result = applied(function, static, params, inputs)
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


def check_products(expected: Mapping[str, str], program: Program, used: Iterable[Site]) -> None:
    """Raise InvalidInputError unless a program has the calibrated products, in their order.

    Names are generated, so another product may have the same one; the products in `used` must have the same weights.
    """
    names = {site.name for site in used}
    for known, found in zip_longest(expected.items(), program.products.items(), fillvalue=("", "")):
        if known[0] != found[0] or (known[0] in names and known[1] != found[1]):
            wanted = "the product that was calibrated" if known[0] else "no further product"
            got = "another one of this name" if known[0] == found[0] else f"`{found[0]}`" if found[0] else "none"
            raise InvalidInputError(f"layer `{known[0] or found[0]}`: expected {wanted}, got {got}{_OTHERWISE}")


def check_names(expected: Set[str], program: Program) -> None:
    """Raise InvalidInputError unless the operands of a program are those that were calibrated."""
    found = {*program.tensors, *program.opaque}
    if others := sorted(found ^ expected):
        raise InvalidInputError(
            f"layer `{others[0]}`: expected the function that was calibrated, got another{_OTHERWISE}"
        )


def program_of(function: Function, params: Any, inputs: tuple[Any, ...]) -> Program:
    """Return the program of a function of these arguments; the arrays may be shapes."""
    own, given = split(params), split_inputs(inputs)
    return trace(function, (own.static, given.static), own.arrays, given.arrays)


def _paths(static: Static, arrays: Sequence[Any]) -> list[str]:
    return array_paths(static.filled([np.empty(0)] * len(arrays)))
