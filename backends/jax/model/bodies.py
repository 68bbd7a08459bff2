"""The jaxprs inside of an equation: bodies of calls, loops and branches."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from jax.extend.core import ClosedJaxpr, Jaxpr

_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}
"""Primitives that call a function once, and which of their parameters it is."""
_Item = TypeVar("_Item")


class Bodies(NamedTuple):
    """What is inside of an equation, and how its operands get there."""

    kind: str
    """`call`, `scan`, `while` or `cond`."""
    jaxprs: list[ClosedJaxpr]
    skip: int = 0
    """Operands before those of the bodies."""
    num_consts: int | None = None
    """Operands that each iteration gets as they are; None if all are."""
    num_carry: int = 0
    hidden: Sequence[Jaxpr] = ()
    """Jaxprs that are not interpreted."""

    @property
    def inline(self) -> bool:
        """Return whether the body is called once, with the operands as they are."""
        return self.kind == "call"

    def parts(self, operands: Sequence[_Item]) -> tuple[list[_Item], list[_Item], list[_Item]]:
        """Return consts, carry and xs."""
        given = list(operands[self.skip :])
        consts = len(given) if self.num_consts is None else self.num_consts
        carried = consts + self.num_carry
        return given[:consts], given[consts:carried], given[carried:]


def bodies_of(equation: Any) -> Bodies | None:
    """Return the bodies of an equation; None if it has none that can be interpreted."""
    name, params = equation.primitive.name, equation.params
    if name in _CALLS:
        return Bodies("call", [_closed(params[_CALLS[name]])])
    if name == "scan":
        return Bodies("scan", [_closed(params["jaxpr"])], 0, *_consts_and_carry(params))
    if name == "while":
        skip, consts = params["cond_nconsts"], params["body_nconsts"]
        carry = len(equation.invars) - skip - consts
        return Bodies("while", [_closed(params["body_jaxpr"])], skip, consts, carry, jaxprs_in([params["cond_jaxpr"]]))
    if name == "cond":
        return Bodies("cond", [_closed(branch) for branch in params["branches"]], 1)
    return None


def known_bodies(equation: Any) -> Bodies:
    """Return the bodies of an equation that has some."""
    found = bodies_of(equation)
    if found is None:
        raise TypeError(f"`{equation.primitive.name}` has no bodies that can be interpreted")
    return found


def jaxprs_in(values: Iterable[Any]) -> list[Jaxpr]:
    """Return the jaxprs among the parameters of an equation."""
    found: list[Jaxpr] = []
    for value in values:
        if isinstance(value, ClosedJaxpr):
            found.append(value.jaxpr)
        elif isinstance(value, Jaxpr):
            found.append(value)
        elif isinstance(value, tuple | list):
            found.extend(jaxprs_in(value))
    return found


def _consts_and_carry(params: Any) -> tuple[int, int]:
    """Return how many operands of a scan are the same in each iteration, and how many are carried on."""
    if "ft_in" in params:  # since JAX 0.12
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]


def _closed(jaxpr: Any) -> ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())
