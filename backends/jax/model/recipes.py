"""How a weight follows from parameters and constants, as a text: equal in all programs of which the weights are equal.

When a quantized function is called, its weights have no values yet. But the path of a parameter is known, the value of
a constant, and every operation on them.
"""

import hashlib
from collections.abc import Sequence
from typing import Any


def recipe_of_result(equation: Any, number: int, operands: Sequence[str]) -> str:
    """Return the recipe of a result of an equation; the dtype does not matter."""
    name = str(equation.primitive.name)
    if name == "convert_element_type":
        return operands[0]
    plain = {key: value for key, value in sorted(equation.params.items()) if _is_plain(value)}
    return hashlib.sha256(repr((name, number, plain, *operands)).encode()).hexdigest()


def _is_plain(value: Any) -> bool:
    """Return whether the text of a parameter says all about it, unlike that of a function, with its address."""
    return (
        value is None
        or isinstance(value, int | float | str)
        or (isinstance(value, tuple) and all(map(_is_plain, value)))
    )
