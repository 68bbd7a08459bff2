"""What each product in INT8 costs the results of a function."""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from klquant.errors import InvalidInputError

from ...accuracy.sums import Sums, compare_arrays
from ...batches import numbered, progress_bar
from ...calibration import Calibration
from ..grids import make_grids
from ..kernels import multiply_simulated, rounded_operands, wide_dtype
from ..model.arguments import Function, Static, inputs_of, split, split_inputs
from ..model.interpretation import Rule, interpret
from ..model.sites import Site
from ..model.tracing import check_names, trace


class ProductCost(NamedTuple):
    """What one product does to the results. SQNR is in dB."""

    name: str
    """Of the product."""
    alone_sqnr_db: float
    """Of the results if only this product is in INT8. The lower, the more harmful it is."""
    without_sqnr_db: float
    """Of the results if all products but this one are in INT8. The higher, the more it gains in floating point."""


def sensitivity(
    f: Function, params: Any, calibration: Calibration, batches: Iterable[Any], *, progress: bool = True
) -> list[ProductCost]:
    """Quantize one product at a time, and all but one, and compare the results with those in floating point.

    Parameters
    ----------
    f : callable (params, *inputs)
    params : pytree
        Those that were calibrated.
    calibration : Calibration
        With thresholds.
    batches : iterable
        Few data are enough; iterated once.
    progress : bool
        Show a bar on a terminal.

    Returns
    -------
    list of ProductCost
        The most harmful first.

    Raises
    ------
    InvalidInputError
        For no batches, a calibration without thresholds, and results that are not in floating point.

    Notes
    -----
    The function is compiled once, with a switch for each product, in the floating-point simulation of INT8. It runs
    ``2 * products + 1`` times on each batch.
    """
    names = sorted({product_of(name) for name in calibration.thresholds})
    if not names:
        raise InvalidInputError("expected a calibration with thresholds, got one without; call search_thresholds")
    run = _switchable(f, calibration)
    sums = {(name, only): Sums() for name in names for only in (True, False)}
    number = -1
    with progress_bar("sensitivity" if progress else "", batches, steps=len(sums)) as advance:
        for number, batch in numbered(batches):  # noqa: B007
            exact = run(params, batch, ())
            for (name, only), total in sums.items():
                chosen = {name} if only else set(names) - {name}
                sums[name, only] = total.plus(_compared(exact, run(params, batch, chosen)))
                advance()
    if number < 0:
        raise InvalidInputError("expected at least one batch, got none")
    costs = [ProductCost(name, sums[name, True].sqnr_db, sums[name, False].sqnr_db) for name in names]
    return sorted(costs, key=lambda cost: cost.alone_sqnr_db)


def product_of(tensor: str) -> str:
    """Return the name of the product that an operand belongs to."""
    return tensor.removesuffix(".lhs").removesuffix(".rhs")


def _compared(exact: Sequence[Any], other: Sequence[Any]) -> Sums:
    total = Sums()
    for x, y in zip(exact, other, strict=True):
        total = total.plus(compare_arrays(x, y))
    return total


def _switchable(f: Function, calibration: Calibration) -> Callable[[Any, Any, Container[str]], list[Any]]:
    """Return a function of parameters, a batch and the products in INT8, which returns all floating-point results."""
    grids, names = make_grids(calibration.thresholds, {}), sorted({product_of(name) for name in calibration.thresholds})

    def run(static: tuple[Static, Static], params: Sequence[Any], inputs: Sequence[Any], on: Mapping[str, Any]) -> Any:
        program = trace(f, static, params, inputs)
        check_names({*calibration.amax, *calibration.skipped}, program)
        sites = {path: site for path, site in program.sites.items() if grids.keys() >= {*site.tensors.values()}}

        def apply(site: Site, operands: Sequence[Any], weight: Any, state: Any) -> tuple[Any, Any]:
            rounded = rounded_operands(site, operands, grids, calibration.settings.dead_channel)
            chosen = [jnp.where(on[site.name], y, x) for x, y in zip(operands, rounded, strict=True)]
            return multiply_simulated(site, chosen), state

        results = interpret(program.jaxpr, [*params, *inputs], Rule(apply, sites), {})[0]
        return [x.astype(wide_dtype(x.dtype)) for x in results if _is_float(x)]

    compiled = jax.jit(run, static_argnums=0)

    def switched(params: Any, batch: Any, chosen: Container[str]) -> list[Any]:
        on = {name: np.asarray(name in chosen) for name in names}
        own, given = split(params), split_inputs(inputs_of(batch))
        found = jax.device_get(compiled((own.static, given.static), own.arrays, given.arrays, on))
        return list(map(np.asarray, found))

    return switched


def _is_float(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.floating))
