"""The weights of the products: operands that follow from the parameters alone, evaluated once."""

from collections.abc import Sequence
from typing import Any

from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from .bodies import known_bodies
from .interpretation import bind
from .sites import Path, Site, below


class _Unknown:
    """Stands for a value that depends on the inputs."""


UNKNOWN = _Unknown()


def evaluate_weights(closed: ClosedJaxpr, params: Sequence[Any], sites: dict[Path, Site]) -> dict[Path, Any]:
    """Return the weight of every site that has one.

    Parameters
    ----------
    closed : ClosedJaxpr
        Its first arguments are the parameters.
    params : sequence of arrays
    sites : dict

    Returns
    -------
    dict
        Arrays by path. One that differs between the iterations of scans has their lengths as its first axes.
    """
    wanted = {path: site for path, site in sites.items() if site.weight is not None}
    given = [*params, *[UNKNOWN] * (len(closed.jaxpr.invars) - len(params))]
    return _evaluate(closed.jaxpr, closed.consts, given, wanted, ())[1]


def _evaluate(
    jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], wanted: dict[Path, Site], path: Path
) -> tuple[list[Any], dict[Path, Any]]:
    """Return the results that are known, and the weights of the wanted sites."""
    values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    found: dict[Path, Any] = {}

    def read(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else values[v]

    for number, equation in enumerate(jaxpr.eqns):
        here = (*path, number)
        operands = [read(v) for v in equation.invars]
        results: list[Any] = [UNKNOWN] * len(equation.outvars)
        if here in wanted:
            found[here] = operands[wanted[here].weight or 0]
        elif not any(operand is UNKNOWN for operand in operands) and not equation.effects:
            results = bind(equation, operands)
        elif inside := {other: wanted[other] for other in below(here, wanted)}:
            inner, weights = _evaluate_bodies(equation, operands, inside, here)
            found |= weights
            results = inner or results
        values.update(zip(equation.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars], found


def _evaluate_bodies(
    equation: Any, operands: list[Any], wanted: dict[Path, Site], here: Path
) -> tuple[list[Any], dict[Path, Any]]:
    """Return the results of a call, if the equation is one, and the weights inside."""
    bodies = known_bodies(equation)
    consts, carry, xs = bodies.parts(operands)
    state, found, results = [UNKNOWN] * len(carry), dict[Path, Any](), list[Any]()
    constant = {path: site for path, site in wanted.items() if here not in site.varies}
    for number, body in enumerate(bodies.jaxprs):
        given = [*consts, *state, *[UNKNOWN] * len(xs)]
        inside = {path: site for path, site in constant.items() if path[: len(here) + 1] == (*here, number)}
        results, weights = _evaluate(body.jaxpr, body.consts, given, inside, (*here, number))
        found |= weights
    if varying := {path: site for path, site in wanted.items() if here in site.varies}:
        found |= _stacked(bodies.jaxprs[0], [*consts, *state], xs, varying, (*here, 0))
    return (results if bodies.inline else []), found


def _stacked(
    body: ClosedJaxpr, given: list[Any], xs: list[Any], wanted: dict[Path, Site], path: Path
) -> dict[Path, Any]:
    """Return the weights of all iterations of a scan."""
    known = [x for x in xs if x is not UNKNOWN]

    def step(known: Any) -> dict[Path, Any]:
        following = iter(known)
        sliced = [x if x is UNKNOWN else next(following) for x in xs]
        return _evaluate(body.jaxpr, body.consts, [*given, *sliced], wanted, path)[1]

    weights: dict[Path, Any] = lax.map(step, known)
    return weights
