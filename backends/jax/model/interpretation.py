"""Evaluate a jaxpr with another rule for some of its products, through calls, loops and branches.

The rule may carry a state from product to product. In a loop the state of the products inside is part of what the loop
carries, so one traced program does everything.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from .bodies import Bodies, known_bodies
from .sites import Path, Site, below

State: TypeAlias = dict[Path, Any]
"""What the rule has found at each site."""


class Rule(NamedTuple):
    """What to do at some of the sites."""

    apply: Callable[[Site, Sequence[Any], Any, Any], tuple[Any, Any]]
    """From a site, its operands, its weight and its state to its result and its new state."""
    sites: Mapping[Path, Site]
    """Those to which it applies; all else is evaluated as it is."""
    weights: Mapping[Path, Any] = {}
    """What it needs at each of them, from :func:`~.weights.evaluate_weights`."""


def interpret(closed: ClosedJaxpr, args: Sequence[Any], rule: Rule, state: State) -> tuple[list[Any], State]:
    """Return the results of a jaxpr, and the state after it."""
    return _interpret(closed.jaxpr, closed.consts, args, rule, dict(state), ())


def bind(equation: Any, operands: Sequence[Any]) -> list[Any]:
    """Return the results of one equation as it is."""
    return list(jaxpr_as_fun(_alone(equation))(*given_to(equation, operands)))


def given_to(equation: Any, operands: Sequence[Any]) -> list[Any]:
    """Return each operand once, without literals."""
    given = {v: operand for v, operand in zip(equation.invars, operands, strict=True) if not isinstance(v, Literal)}
    return list(given.values())


def _alone(equation: Any) -> ClosedJaxpr:
    """Return a jaxpr of this equation alone: evaluating that is public, and the same in all versions."""
    variables = list(dict.fromkeys(v for v in equation.invars if not isinstance(v, Literal)))
    parts = {"invars": variables, "outvars": equation.outvars, "eqns": [equation], "effects": equation.effects}
    return ClosedJaxpr(_empty().replace(**parts), [])


@functools.cache
def _empty() -> Any:
    """Return a jaxpr to make others of: its constructor needs more than is public."""
    return jax.make_jaxpr(lambda: ())().jaxpr


def _interpret(
    jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], rule: Rule, state: State, path: Path
) -> tuple[list[Any], State]:
    values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else values[v]

    for number, equation in enumerate(jaxpr.eqns):
        here = (*path, number)
        operands = [read(v) for v in equation.invars]
        if here in rule.sites:
            result, state[here] = rule.apply(rule.sites[here], operands, rule.weights.get(here), state.get(here))
            results = [result]
        elif below(here, rule.sites):
            results, state = _descend(equation, operands, rule, state, here)
        else:
            results = bind(equation, operands)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars], state


def _descend(equation: Any, operands: list[Any], rule: Rule, state: State, here: Path) -> tuple[list[Any], State]:
    """Evaluate an equation with sites inside."""
    bodies = known_bodies(equation)
    inner = {path: state.get(path) for path in below(here, rule.sites)}
    results, inner = _EVALUATE[bodies.kind](equation, bodies, operands, rule, inner, here)
    return results, {**state, **inner}


def _evaluate_call(
    equation: Any, bodies: Bodies, operands: list[Any], rule: Rule, state: State, here: Path
) -> tuple[list[Any], State]:
    [body] = bodies.jaxprs
    return _interpret(body.jaxpr, body.consts, operands, rule, state, (*here, 0))


def _evaluate_scan(
    equation: Any, bodies: Bodies, operands: list[Any], rule: Rule, state: State, here: Path
) -> tuple[list[Any], State]:
    """Evaluate a scan; weights that differ between its iterations are sliced with its other inputs."""
    [body], params = bodies.jaxprs, equation.params
    consts, carry, xs = bodies.parts(operands)
    sliced = {path: rule.weights[path] for path in state if here in rule.sites[path].varies and path in rule.weights}

    def step(carried: Any, x: Any) -> Any:
        (carry, state), (xs, weights) = carried, x
        inner = rule._replace(weights={**rule.weights, **weights})
        results, state = _interpret(body.jaxpr, body.consts, [*consts, *carry, *xs], inner, state, (*here, 0))
        return (results[: bodies.num_carry], state), results[bodies.num_carry :]

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    (carry, state), ys = lax.scan(step, (carry, state), (xs, sliced), **options)
    return [*carry, *ys], state


def _evaluate_while(
    equation: Any, bodies: Bodies, operands: list[Any], rule: Rule, state: State, here: Path
) -> tuple[list[Any], State]:
    [body], condition = bodies.jaxprs, equation.params["cond_jaxpr"]
    consts, carry, _ = bodies.parts(operands)

    def unfinished(carried: Any) -> Any:
        return jaxpr_as_fun(condition)(*operands[: bodies.skip], *carried[0])[0]

    def step(carried: Any) -> Any:
        carry, state = carried
        return _interpret(body.jaxpr, body.consts, [*consts, *carry], rule, state, (*here, 0))

    result: tuple[list[Any], State] = lax.while_loop(unfinished, step, (carry, state))
    return result


def _evaluate_cond(
    equation: Any, bodies: Bodies, operands: list[Any], rule: Rule, state: State, here: Path
) -> tuple[list[Any], State]:
    def branch(number: int, body: ClosedJaxpr) -> Callable[..., Any]:
        def run(state: State, *operands: Any) -> Any:
            return _interpret(body.jaxpr, body.consts, operands, rule, dict(state), (*here, number))

        return run

    branches = [branch(number, body) for number, body in enumerate(bodies.jaxprs)]
    result: tuple[list[Any], State] = lax.switch(operands[0], branches, state, *operands[1:])
    return result


_EVALUATE: dict[str, Callable[..., tuple[list[Any], State]]] = {
    "call": _evaluate_call,
    "scan": _evaluate_scan,
    "while": _evaluate_while,
    "cond": _evaluate_cond,
}


def without_rule(closed: ClosedJaxpr, sites: Mapping[Path, Site], args: Sequence[Any]) -> list[Any]:
    """Return the results of a jaxpr, going into every body with sites and changing nothing."""

    def unchanged(site: Site, operands: Sequence[Any], weight: Any, state: Any) -> tuple[Any, Any]:
        return bind(site.equation, operands)[0], state

    return interpret(closed, args, Rule(unchanged, sites), {})[0]
