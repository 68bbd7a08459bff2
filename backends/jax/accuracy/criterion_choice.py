"""Choose a criterion for each activation by the error that its threshold causes in the product."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...accuracy.criterion_choice import choose_all, distinct_thresholds
from ...batches import numbered, tracked
from ...calibration import Calibration
from ...collection.bins import Array
from ...collection.distributed import Group, add_up, failing_together
from ...settings import LayerOptions
from ...thresholds import LayerThreshold, candidate_thresholds, search_thresholds
from ..kernels import fake_quantize, multiply_simulated, quantize_weight
from ..model.arguments import Function, Static, inputs_of, split, split_inputs
from ..model.interpretation import Rule, bind, interpret
from ..model.sites import Site
from ..model.tracing import trace

AUTO_BATCHES = 8  # on which criterion="auto" chooses


def auto_thresholds(
    f: Function,
    params: Any,
    calibration: Calibration,
    batches: Iterable[Any] | None,
    *,
    progress: bool = True,
    group: Group = None,
) -> dict[str, LayerThreshold]:
    """Return the thresholds of the criterion that is best for each tensor whose options name none.

    Parameters
    ----------
    f, params
        The function that was calibrated.
    calibration : Calibration
        With histograms.
    batches : iterable, optional
        The calibration data of this process; the errors of all processes are added up.
    progress : bool
    group : process group, optional

    Returns
    -------
    dict
        A LayerThreshold by name.
    """
    options = calibration.settings.resolve(calibration.amax)
    candidates = candidate_thresholds(calibration.amax, calibration.histograms, options, calibration.hidden)
    distinct = distinct_thresholds(candidates)
    scales = {name: [found.scale for found in by_threshold.values()] for name, by_threshold in distinct.items()}
    data = () if batches is None else islice(batches, AUTO_BATCHES)
    with failing_together(group):
        own = _measured(f, params, calibration, options, scales, data, progress)
    totals = {name: add_up(own[name], group) for name in sorted(own)}
    by_threshold = {name: dict(zip(distinct[name], totals[name].tolist(), strict=True)) for name in own}
    chosen: dict[str, Any] = {name: choice.criterion for name, choice in choose_all(candidates, by_threshold).items()}
    best = {name: layer.over(LayerOptions(chosen.get(name))) for name, layer in options.items()}
    return search_thresholds(
        calibration.amax,
        calibration.histograms,
        options=best,
        hidden=calibration.hidden,
        guard=calibration.settings.guard,
    )


def _measured(
    f: Function,
    params: Any,
    calibration: Calibration,
    options: Mapping[str, LayerOptions],
    scales: Mapping[str, Sequence[float]],
    batches: Iterable[Any],
    progress: bool,
) -> dict[str, Array]:
    """Return the squared error of the product for each scale of each tensor, summed over the batches."""
    bits = {name: int(layer.num_bits or 8) for name, layer in options.items()}
    own = split(params)
    step = jax.jit(functools.partial(_errors, f, bits, calibration.settings.dead_channel), static_argnums=0)
    totals = {name: np.zeros(len(found)) for name, found in scales.items()}
    for _, batch in numbered(tracked(batches, "choice of criteria" if progress else "")):
        given = split_inputs(inputs_of(batch))
        errors = jax.device_get(step((own.static, given.static), own.arrays, given.arrays, scales))
        totals = {name: total + errors[name].astype(np.float64) for name, total in totals.items()}
    return totals


def _errors(
    function: Function,
    bits: Mapping[str, int],
    dead_channel: float,
    static: tuple[Static, Static],
    params: Sequence[Any],
    inputs: Sequence[Any],
    scales: Mapping[str, Sequence[Any]],
) -> dict[str, Any]:
    """Return the squared error of the product for each scale of each tensor: its weight is rounded, too."""
    program = trace(function, static, params, inputs)
    sites = {path: site for path, site in program.sites.items() if scales.keys() & set(site.tensors.values())}

    def apply(site: Site, operands: Sequence[Any], weight: Any, state: Any) -> tuple[Any, Any]:
        result = bind(site.equation, operands)[0]
        rounded = list(operands)
        if site.weight is not None:
            once = site._replace(varies=frozenset())  # in a scan this is the weight of one iteration
            name = site.tensors[1 - site.weight]
            rounded[site.weight] = quantize_weight(once, operands[site.weight], bits[name], dead_channel).values
        return result, {
            name: total + _each_error(site, rounded, k, result, jnp.stack(scales[name]), bits[name])
            for (k, name), total in zip(_chosen(site, scales), state.values(), strict=True)
        }

    before = {
        path: {name: jnp.zeros(len(scales[name]), jnp.float32) for _, name in _chosen(site, scales)}
        for path, site in sites.items()
    }
    after = interpret(program.jaxpr, [*params, *inputs], Rule(apply, sites), before)[1]
    found = {name: errors for state in after.values() for name, errors in state.items()}
    return {name: found[name] for name in scales}


def _chosen(site: Site, names: Mapping[str, Any]) -> list[tuple[int, str]]:
    return sorted(((k, name) for k, name in site.tensors.items() if name in names), key=lambda item: item[1])


def _each_error(site: Site, operands: list[Any], k: int, exact: Any, scales: Any, num_bits: int) -> Any:
    def error(scale: Any) -> Any:
        given = [fake_quantize(x, scale, num_bits) if k == number else x for number, x in enumerate(operands)]
        difference = (multiply_simulated(site, given) - exact).astype(jnp.float32)
        return (difference**2).sum()

    return jnp.stack([error(scale) for scale in scales])
