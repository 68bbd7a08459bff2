"""Bias correction: what rounding takes from the mean of each output channel is added to the result of the product.

After M. Nagel, M. van Baalen, T. Blankevoort and M. Welling, Data-Free Quantization Through Weight Equalization and
Bias Correction, ICCV 2019, appendix D; here the input is rounded as well.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from klquant.errors import InvalidInputError

from ..batches import numbered, tracked
from ..collection.distributed import Group, add_up
from .grids import Grid
from .kernels import multiply_simulated, rounded_operands, shift_shape
from .model.arguments import Function, Static, inputs_of, split, split_inputs
from .model.interpretation import Rule, bind, interpret
from .model.sites import Site
from .model.tracing import check_products, trace


def mean_shifts(  # noqa: PLR0913 what a quantization knows
    f: Function,
    params: Any,
    batches: Iterable[Any],
    grids: Mapping[str, Grid],
    lengths: Mapping[str, tuple[int, ...]],
    *,
    products: Mapping[str, str],
    dead_channel: float,
    progress: bool = True,
    group: Group = None,
) -> dict[str, "np.ndarray[Any, Any]"]:
    """Return ``mean(W x - W_hat x_hat)`` of each output channel, where x is the operand in the float function.

    Parameters
    ----------
    f, params
        The function and its parameters.
    batches : iterable
        Calibration data, iterated once; those of this process.
    grids : mapping
        By name of the activation.
    lengths : mapping
        Of the scans in which each product has another weight in each iteration, by the name of each product that has a
        weight.
    products : mapping
        What identifies each product of the function, by name.
    dead_channel : float
    progress : bool
    group : process group, optional

    Returns
    -------
    dict
        By name of the product: float32, with the axes of scans, then those of the output; of length 1 but for channels.
    """
    step = jax.jit(functools.partial(_sums, f, grids, lengths, products, dead_channel), static_argnums=0)
    own, totals = split(params), dict[str, Any]()
    for _, batch in numbered(tracked(batches, "bias correction" if progress else "")):
        given = split_inputs(inputs_of(batch))
        found = jax.device_get(step((own.static, given.static), own.arrays, given.arrays))
        for name, parts in found.items():
            sums = [np.asarray(part, np.float64) for part in parts]
            totals[name] = [a + b for a, b in zip(totals.get(name, (0.0, 0.0)), sums, strict=True)]
    if not totals and lengths:
        raise InvalidInputError("expected at least one calibration batch, got none")
    return {
        name: _mean(add_up(sums, group), add_up(numbers, group), lengths[name])
        for name, (sums, numbers) in sorted(totals.items())
    }


def _mean(sums: Any, numbers: Any, lengths: tuple[int, ...]) -> "np.ndarray[Any, Any]":
    """Return the means; 0 for iterations that were never run."""
    mean = sums / np.maximum(numbers, 1).reshape(-1, *[1] * (sums.ndim - 1))
    if not np.isfinite(mean).all():
        raise InvalidInputError("activations must be finite, got NaN or infinity")
    return np.asarray(mean.reshape(*lengths, *sums.shape[1:]), np.float32)


def _sums(
    f: Function,
    grids: Mapping[str, Grid],
    lengths: Mapping[str, tuple[int, ...]],
    products: Mapping[str, str],
    dead_channel: float,
    static: tuple[Static, Static],
    params: Sequence[Any],
    inputs: Sequence[Any],
) -> dict[str, tuple[Any, Any]]:
    """Return the sums of the differences, and how many were summed up, for each iteration of the scans."""
    program = trace(f, static, params, inputs)
    sites = {
        path: site
        for path, site in program.sites.items()
        if site.name in lengths and grids.keys() >= {*site.tensors.values()}
    }
    check_products(products, program, sites.values())

    def apply(site: Site, operands: Sequence[Any], iteration: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
        exact = bind(site.equation, operands)[0]
        rounded = multiply_simulated(site, rounded_operands(site, operands, grids, dead_channel))
        difference, shape = (exact - rounded).astype(jnp.float32), shift_shape(site)
        axes = tuple(axis for axis, size in enumerate(shape) if size == 1)
        sums, numbers = state
        total = difference.sum(axis=axes, keepdims=True)
        return exact, (sums.at[iteration].add(total), numbers.at[iteration].add(difference.size // total.size))

    steps = {path: int(np.prod(lengths[site.name], dtype=np.int64)) for path, site in sites.items()}
    before = {
        path: (jnp.zeros((steps[path], *shift_shape(site)), jnp.float32), jnp.zeros(steps[path], jnp.int32))
        for path, site in sites.items()
    }
    iterations = {
        path: np.arange(steps[path], dtype=np.int32).reshape(lengths[site.name]) for path, site in sites.items()
    }
    after = interpret(program.jaxpr, [*params, *inputs], Rule(apply, sites, iterations), before)[1]
    return {site.name: after[path] for path, site in sites.items()}
