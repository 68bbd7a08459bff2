"""PRelu with one slope per channel, from operators that have INT8 kernels.

PRelu(x) = x + relu((slope - 1) x) if no slope is above 1; in general PRelu(x) = x + (1 - slope) relu(-x).
"""

from typing import NamedTuple

import numpy as np
import onnx

from ..feeds import Array
from .draft import Draft


class Split(NamedTuple):
    """The nodes that replace a PRelu."""

    nodes: list[onnx.NodeProto]
    limits: dict[str, float]
    """The largest absolute value of new tensors, as a multiple of the least value of x."""
    products: set[str]
    """Names of the nodes that multiply by a constant."""


def split_prelu(draft: Draft, node: onnx.NodeProto, name: str, slopes: Array) -> Split:
    """Return nodes that compute what a PRelu does, where x is the tensor `name`."""
    output = node.output[0]
    product, negative = draft.unused(f"{output}_product"), draft.unused(f"{output}_negative")
    below_1 = slopes.max() <= 1
    factors = draft.constant(f"{output}_slopes", slopes - 1 if below_1 else -1.0)
    first = draft.node("Mul", [name, factors], product)
    new, products = [first, draft.node("Relu", [product], negative)], {first.name}
    limits, added = {negative: float(1 - slopes.min()) if below_1 else 1.0}, negative
    if not below_1:
        added = draft.unused(f"{output}_added")
        second = draft.node("Mul", [negative, draft.constant(f"{output}_slopes", 1 - slopes)], added)
        new, products = [*new, second], {*products, second.name}
        limits[added] = float(np.abs(1 - slopes).max())
    return Split([*new, draft.node("Add", [name, added], output, node.name)], limits, products)
