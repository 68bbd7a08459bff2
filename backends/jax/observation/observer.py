"""A JAX function as the collector sees it: one jitted function of a batch that returns all statistics."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax

from klquant.errors import InvalidInputError, KLQuantError, ModelError

from ...collection import Bins, Observation, look
from ...collection.bins import BinsFor
from ..model.arguments import Function, Static, digest_of, inputs_of, split, split_inputs
from ..model.interpretation import Rule, bind, interpret
from ..model.sites import Site
from ..model.tracing import check_products, trace
from .counting import Seen, Table, counted, nothing, packed, see, table_of, unpacked


class JaxObserver:
    """A function and the operands to observe: an :class:`~klquant.backends.collection.ObservedModel`.

    Parameters
    ----------
    function : callable (params, *inputs)
    params : pytree
    dtypes : mapping
        The dtypes of the operands to observe, by name.
    products : mapping
        What identifies each product of the function, by name.
    """

    kind = "layer"

    def __init__(self, function: Function, params: Any, dtypes: Mapping[str, Any], products: Mapping[str, str]) -> None:
        self.names: Sequence[str] = list(dtypes)
        self._params, self._dtypes = split(params), dict(dtypes)
        self._last: dict[str, Bins] = {}
        self.spreads: dict[str, float] = dict.fromkeys(dtypes, 1.0)
        """By which factor the ranges of an operand differ between the iterations of a loop, at most."""
        self._step = jax.jit(functools.partial(_statistics, function, tuple(dtypes), products), static_argnums=0)

    def observe(self, batch: Any, bins_for: BinsFor, number: int) -> dict[str, Observation]:
        """Run the function on a batch; return what each operand holds.

        The bins have to be known before. Those of the last batch are taken; if they are too narrow, as in a single pass
        they may be, the batch is run again.
        """
        bins = {name: chosen for name in self.names if (chosen := self._expected(name, bins_for))}
        found = self._run(batch, bins, number)
        wanted = {name: self._wanted(name, seen, bins_for, number) for name, seen in found.items()}
        wider = {name: new for name, new in wanted.items() if new and not _holds(bins.get(name), new)}
        if wider:
            bins |= wider
            found = self._run(batch, bins, number)
        self._last |= bins
        self.spreads |= {name: max(self.spreads[name], _spread(seen)) for name, seen in found.items()}
        return {name: _observation(name, seen, bins if wanted[name] else {}) for name, seen in found.items()}

    def digest(self, batch: Any) -> str:
        """Return a hash of the arrays, numbers and strings in a batch."""
        return digest_of(batch)

    def _expected(self, name: str, bins_for: BinsFor) -> Bins | None:
        """Return the bins that a tensor will need, as far as that is known before it is computed."""
        try:
            least = bins_for(name, 0.0)
        except InvalidInputError:  # it was not called in the first pass
            return None
        last = self._last.get(name)
        return last if least and last and _holds(last, least) else least

    def _wanted(self, name: str, seen: Seen, bins_for: BinsFor, number: int) -> Bins | None:
        with _located(f"layer `{name}`, batch {number}"):
            found: list[Bins] = []

            def asked(name: str, amax: float) -> None:
                found.extend(filter(None, [bins_for(name, amax)]))

            look(name, seen.low, seen.high, asked, lambda bins: counted(seen, bins))
        return found[0] if found else None

    def _run(self, batch: Any, bins: Mapping[str, Bins], number: int) -> dict[str, Seen]:
        """Return what is seen of each operand that was computed."""
        tables = {name: table_of(chosen, self._dtypes[name]) for name, chosen in bins.items()}
        inputs = split_inputs(inputs_of(batch))
        try:
            ranges, numbers = jax.device_get(
                self._step((self._params.static, inputs.static), self._params.arrays, inputs.arrays, tables)
            )
        except KLQuantError as error:
            raise type(error)(f"batch {number}: {error}") from error
        except Exception as error:
            raise ModelError(f"batch {number}: the function failed, with {type(error).__name__}: {error}") from error
        sizes = {name: bins[name].num_bins if name in bins else 0 for name in self.names}
        return {name: seen for name, seen in unpacked(ranges, numbers, sizes).items() if seen.calls}


def _holds(bins: Bins | None, other: Bins) -> bool:
    """Return whether counts in these bins are counts in the other ones, after merging."""
    if bins is None or bins.level is None or other.level is None:
        return bins == other
    return bins.num_bins == other.num_bins and bins.level >= other.level


def _spread(seen: Seen) -> float:
    return float(max(-seen.low, seen.high) / seen.least) if seen.least < math.inf else 1.0


def _observation(name: str, seen: Seen, bins: Mapping[str, Bins]) -> Observation:
    found = look(name, seen.low, seen.high, lambda name, _: bins.get(name), lambda chosen: counted(seen, chosen))
    return found._replace(calls=int(seen.calls))


@contextmanager
def _located(where: str) -> Iterator[None]:
    try:
        yield
    except KLQuantError as error:
        raise type(error)(f"{where}: {error}") from error


def _statistics(
    function: Function,
    names: tuple[str, ...],
    products: Mapping[str, str],
    static: tuple[Static, Static],
    params: Sequence[Any],
    inputs: Sequence[Any],
    tables: Mapping[str, Table],
) -> tuple[Any, Any]:
    """Return the statistics of all operands, as two vectors."""
    program = trace(function, static, params, inputs)
    operands = {
        path: {k: name for k, name in site.tensors.items() if name in names} for path, site in program.sites.items()
    }
    observed = {path: site for path, site in program.sites.items() if operands[path]}
    check_products(products, program, observed.values())

    def apply(site: Site, values: Sequence[Any], weight: Any, state: dict[int, Seen]) -> tuple[Any, dict[int, Seen]]:
        seen = {k: see(values[k], tables.get(name), state[k]) for k, name in operands[site.path].items()}
        return bind(site.equation, values)[0], seen

    before = {
        path: {k: nothing(tables.get(name), site.equation.invars[k].aval.dtype) for k, name in operands[path].items()}
        for path, site in observed.items()
    }
    after = interpret(program.jaxpr, [*params, *inputs], Rule(apply, observed), before)[1]
    found = {name: after[path][k] for path in observed for k, name in operands[path].items()}
    return packed({name: found[name] for name in names})
