"""Find the products of a jaxpr that may be quantized, through calls, loops and branches, and what each operand is."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from .arguments import digest_of
from .bodies import Bodies, bodies_of, jaxprs_in
from .paths import common_path, module_path, parent_path, scope_of
from .recipes import recipe_of_result

Path: TypeAlias = tuple[int, ...]
"""Where an equation lies: its number, and for each body around it the number of that equation and of the body."""
PRODUCTS = ("dot_general", "conv_general_dilated")
_OTHERS = ("ragged_dot", "ragged_dot_general", "scaled_dot")  # products that are left in floating point


class Site(NamedTuple):
    """One product of a function. In a loop it is one site for all iterations."""

    path: Path
    equation: Any
    weight: int | None
    """Which operand does not depend on the inputs; None if both are activations."""
    varies: frozenset[Path]
    """The scans of which each iteration has another weight."""
    scope: str
    """Its name scopes."""
    leaf: str
    """Where the weight lies in the parameters."""
    recipe: str = ""
    """How the weight is computed."""
    around: str = ""
    """The module around the products that its operands come from, or around its own weight."""
    reason: str = ""
    """Why it cannot be quantized."""
    name: str = ""

    @property
    def primitive(self) -> str:
        """Return the name of the primitive."""
        return str(self.equation.primitive.name)

    @property
    def tensors(self) -> dict[int, str]:
        """Return the names of the operands that are activations, by number."""
        if self.weight is not None:
            return {1 - self.weight: self.name}
        return {0: f"{self.name}.lhs", 1: f"{self.name}.rhs"}

    @property
    def identity(self) -> str:
        """Return what beside the name must be equal in a program for the same thresholds and weights to serve it."""
        if self.weight is None:
            return self.primitive
        shape = self.equation.invars[self.weight].aval.shape
        return f"{self.primitive} {self.weight} {shape} {contracted(self, self.weight)} {self.recipe}"


class _Origin(NamedTuple):
    """What a value depends on."""

    known: bool
    """Whether it depends on parameters and constants alone."""
    varies: frozenset[Path] = frozenset()
    leaf: str = ""
    recipe: str = ""
    around: str | None = None
    """The module around the products that it comes from; None without products."""


_INPUT = _Origin(False)


def contracted(site: Site, operand: int) -> tuple[int, ...]:
    """Return the axes of an operand that a product sums over."""
    numbers = site.equation.params["dimension_numbers"]
    if site.primitive == "dot_general":
        return tuple(numbers[0][operand])
    if operand == 0:
        return ()
    return tuple(axis for axis in range(len(numbers.rhs_spec)) if axis != numbers.rhs_spec[0])


def terms(site: Site) -> int:
    """Return how many products an output of a site sums up."""
    return int(np.prod([site.equation.invars[1].aval.shape[axis] for axis in contracted(site, 1)], dtype=np.int64))


def find_sites(closed: ClosedJaxpr, paths: Sequence[str]) -> tuple[dict[Path, Site], list[Site]]:
    """Return the products that may be quantized, and those that may not.

    Parameters
    ----------
    closed : ClosedJaxpr
        Its first arguments are the parameters.
    paths : sequence of str
        Where each parameter lies.
    """
    found: list[Site] = []
    given = [_Origin(True, leaf=path, recipe=path) for path in paths]
    given += [_INPUT] * (len(closed.jaxpr.invars) - len(paths))
    _walk(closed, given, (), "", found)
    return {site.path: site for site in found if not site.reason}, [site for site in found if site.reason]


def _walk(closed: ClosedJaxpr, given: Sequence[_Origin], path: Path, scope: str, found: list[Site]) -> list[_Origin]:
    """Add the sites of a jaxpr to those found, and return the origins of its results."""
    jaxpr = closed.jaxpr
    origins: dict[Any, _Origin] = {v: _constant(x) for v, x in zip(jaxpr.constvars, closed.consts, strict=True)}
    origins.update(zip(jaxpr.invars, given, strict=True))
    for number, equation in enumerate(jaxpr.eqns):
        operands = [_constant(v.val) if isinstance(v, Literal) else origins[v] for v in equation.invars]
        here, inner = (*path, number), "/".join(filter(None, [scope, scope_of(equation)]))
        results = _known(equation, operands) or _unknown(equation, operands, here, inner, found)
        unknown = _INPUT._replace(around=_around(equation, operands))
        origins.update(zip(equation.outvars, results or [unknown] * len(equation.outvars), strict=True))
    return [_constant(v.val) if isinstance(v, Literal) else origins[v] for v in jaxpr.outvars]


def _constant(value: Any) -> _Origin:
    return _Origin(True, recipe=digest_of(value))


def _known(equation: Any, operands: Sequence[_Origin]) -> list[_Origin] | None:
    """Return the origins of results that do not depend on the inputs; None for others, and for calls."""
    bodies = bodies_of(equation)
    if equation.effects or (bodies and bodies.inline) or not all(operand.known for operand in operands):
        return None
    leaf = next((operand.leaf for operand in operands if operand.leaf), "")
    varies = frozenset[Path]().union(*(operand.varies for operand in operands))
    recipes = [operand.recipe for operand in operands]
    return [
        _Origin(True, varies, leaf, recipe_of_result(equation, number, recipes))
        for number in range(len(equation.outvars))
    ]


def _around(equation: Any, operands: Sequence[_Origin]) -> str | None:
    """Return the module around the products that a result comes from: around the weight, if this is a product."""
    product = equation.primitive.name in PRODUCTS
    weights = [parent_path(module_path(operand.leaf)) for operand in operands if operand.known and product]
    modules = weights or [operand.around for operand in operands if operand.around is not None]
    return common_path(modules) if modules or product else None


def _unknown(
    equation: Any, operands: Sequence[_Origin], here: Path, scope: str, found: list[Site]
) -> list[_Origin] | None:
    """Add the sites in an equation; return the origins of its results if they are known."""
    if equation.primitive.name in (*PRODUCTS, *_OTHERS):
        found.extend(_products(equation, operands, here, scope))
        return None
    bodies = bodies_of(equation)
    if bodies is None:
        reason = f"it lies inside `{equation.primitive.name}`"
        found.extend(_hidden(jaxprs_in(equation.params.values()), here, scope, reason))
        return None
    found.extend(_hidden(bodies.hidden, here, scope, "it lies in the condition of a loop"))
    results: list[_Origin] = []
    for number, body in enumerate(bodies.jaxprs):
        results = _walk(body, _inside(bodies, operands, here), (*here, number), scope, found)
    return results if bodies.inline else None


def _inside(bodies: Bodies, operands: Sequence[_Origin], here: Path) -> list[_Origin]:
    """Return the origins of what a body is given: the consts as they are, the state of a loop, a slice of xs."""
    consts, carry, xs = bodies.parts(operands)
    sliced = [x._replace(varies=x.varies | {here}) if x.known else x for x in xs]
    return [*consts, *([_INPUT] * len(carry)), *sliced]


def _products(equation: Any, operands: Sequence[_Origin], here: Path, scope: str) -> Iterator[Site]:
    name, dtypes = equation.primitive.name, [v.aval.dtype for v in equation.invars[:2]]
    if not all(jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1 for dtype in dtypes):
        return
    conv = name == "conv_general_dilated"
    weight = 1 if operands[1].known else 0 if operands[0].known and not conv else None
    origin = _INPUT if weight is None else operands[weight]
    grouped = conv and equation.params["batch_group_count"] != 1
    reason = "it has groups in the batch, which gradients of convolutions have" if grouped else ""
    reason = f"`{name}` is not computed in INT8" if name in _OTHERS else reason
    around = _around(equation, operands) or ""
    yield Site(here, equation, weight, origin.varies, scope, origin.leaf, origin.recipe, around, reason)


def _hidden(jaxprs: Sequence[Jaxpr], here: Path, scope: str, reason: str) -> Iterator[Site]:
    for number, jaxpr in enumerate(jaxprs):
        for k, equation in enumerate(jaxpr.eqns):
            path = (*here, number, k)
            if equation.primitive.name in (*PRODUCTS, *_OTHERS):
                sites = _products(equation, [_INPUT, _INPUT], path, scope)
                yield from (site._replace(reason=reason) for site in sites)
            yield from _hidden(jaxprs_in(equation.params.values()), path, scope, reason)


def below(path: Path, sites: Mapping[Path, Any]) -> list[Path]:
    """Return the sites inside of an equation."""
    return [other for other in sites if other[: len(path)] == path and len(other) > len(path)]
