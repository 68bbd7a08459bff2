"""The same jaxpr with other products: the function that rounds its operands."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from .grids import Grid
from .kernels import Form, Levels, arranged, multiply, multiply_simulated, quantize_activation, rounded_operands
from .model.arguments import Function, Static, on_arrays
from .model.interpretation import Rule, interpret
from .model.sites import Site
from .model.tracing import check_products, trace


class Substitution(NamedTuple):
    """How the products of a function are computed."""

    form: Form
    products: Mapping[str, str]
    """What identifies each product of the function, by name."""
    grids: Mapping[str, Grid]
    """Of the operands that are activations, by name."""
    weights: Mapping[str, Levels]
    """By name of the product. In a simulation without them, weights are rounded as they are passed."""
    shifts: Mapping[str, Any]
    """What is added to the results, by name of the product."""
    dead_channel: float


def substituted(f: Function, chosen: Substitution) -> Callable[..., Any]:
    """Return the quantized function; it is traced for the shapes of each call."""

    def run(static: tuple[Static, Static], params: Sequence[Any], inputs: Sequence[Any]) -> Any:
        program = trace(f, static, params, inputs)
        sites = {path: site for path, site in program.sites.items() if chosen.grids.keys() >= {*site.tensors.values()}}
        check_products(chosen.products, program, sites.values())
        given = {path: (chosen.weights.get(site.name), chosen.shifts.get(site.name)) for path, site in sites.items()}
        rule = Rule(functools.partial(_product, chosen), sites, given)
        return jax.tree.unflatten(program.result, interpret(program.jaxpr, [*params, *inputs], rule, {})[0])

    return on_arrays(run, f)


def _product(
    chosen: Substitution, site: Site, operands: Sequence[Any], given: tuple[Levels | None, Any], state: Any
) -> tuple[Any, Any]:
    """Return the product at a site; a weight in integers, and what to add to the result, may be given."""
    weight, shift = given
    if chosen.form == "simulate":
        values = rounded_operands(site, operands, chosen.grids, chosen.dead_channel)
        if site.weight is not None and weight is not None:
            values[site.weight] = weight.values
        result = multiply_simulated(site, values)
        return (result if shift is None else result + shift.astype(result.dtype)), state
    grids = {k: chosen.grids[name] for k, name in site.tensors.items()}
    levels = [
        quantize_activation(arranged(site, k, x), grids[k]) if k in grids else weight for k, x in enumerate(operands)
    ]
    zero_points = [grids[k].zero_point if k in grids else 0 for k in range(len(operands))]
    return multiply(site, [one for one in levels if one is not None], zero_points, shift), state
