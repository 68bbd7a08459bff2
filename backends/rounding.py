"""Round weights so that a layer's outputs keep their values, instead of each weight to the nearest level.

After M. Nagel, R. A. Amjad, M. van Baalen, C. Louizos and T. Blankevoort, Up or Down? Adaptive Rounding for
Post-Training Quantization, ICML 2020. They minimise the error of a layer's outputs over its inputs by gradient descent.
Here one weight after the other is turned over where that lowers the error. So there is nothing to tune, the result is
the same everywhere, and on the inputs in use it is never worse than rounding to nearest.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
SWEEPS = 2
"""How often each weight may be turned over; later sweeps find next to nothing."""
DAMPING = 0.03  # of the mean energy of an input, added to each
FEW = 0.25  # times inputs / samples, if that is more: few samples leave directions in which anything goes
EXACT = 1e-3  # steps: such weights lie on a level, as the largest of each row does
MAX_BATCHES = 8
"""How many batches of data are used."""
MAX_INPUTS = 6000  # of an output: more would take minutes and gigabytes
AT_ONCE = 2**27  # sums of products that are held at the same time
BLOCK = 128  # inputs whose errors are applied to the others together, as one product of matrices


def round_adaptively(weight: Array, scale: Array | float, products: Array, samples: int) -> Array:
    """Return integers, each next to ``weight / scale`` above or below, for the least error of the outputs.

    Parameters
    ----------
    weight : array, shape (outputs, inputs)
    scale : array, shape (outputs, 1), or float
        Step of each row; where it is 0, the integers are 0.
    products : array, shape (inputs, inputs)
        The sum of x x^T over the inputs x of the layer.
    samples : int
        How many inputs that are. The fewer, the closer is the result to rounding to nearest.

    Returns
    -------
    array of int64, shape (outputs, inputs)
        The error trace(E G E^T), with E = integers * scale - weight and G from :func:`with_damping`, is at most that of
        rounding to nearest.
    """
    weight, steps = weight.astype(np.float64), np.broadcast_to(np.asarray(scale, np.float64), (len(weight), 1))
    exact = np.divide(weight, steps, out=np.zeros_like(weight), where=steps > 0)
    codes = np.rint(exact)
    error, damped = codes - exact, with_damping(products, samples)
    slope = error @ damped  # each row in units of its own step
    for _ in range(SWEEPS):
        if not _sweep(codes, error, slope, damped):
            break
    integers: Array = codes.astype(np.int64)
    return integers


def portions(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Yield the names of as many layers at once as memory allows, by the number of their sums of products."""
    some, total = list[str](), 0
    for name, size in sizes.items():
        if some and total + size > AT_ONCE:
            yield some
            some, total = [], 0
        some.append(name)
        total += size
    if some:
        yield some


def with_damping(products: Array, samples: int) -> Array:
    """Return the sum of x x^T as if all inputs had some more energy of their own: the more, the fewer samples."""
    part = max(DAMPING, len(products) / max(samples, 1) * FEW)
    damped: Array = products + np.eye(len(products)) * part * np.mean(np.diag(products))
    return damped


def _sweep(codes: Array, error: Array, slope: Array, products: Array) -> bool:
    """Turn weights over where the error falls by it, in place; return whether there was one."""
    any_turned = False
    for begin in range(0, len(products), BLOCK):
        block = slice(begin, min(begin + BLOCK, len(products)))
        inner, turned = products[block, block], np.zeros_like(error[:, block])
        near = slope[:, block].copy()
        for k in range(inner.shape[0]):
            turn = -np.sign(error[:, begin + k])
            gain = 2 * turn * near[:, k] + inner[k, k]
            turn[(gain >= 0) | (np.abs(error[:, begin + k]) < EXACT)] = 0.0
            turned[:, k] = turn
            error[:, begin + k] += turn
            near += turn[:, None] * inner[k]
        codes[:, block] += turned
        slope += turned @ products[block]
        any_turned |= bool(turned.any())
    return any_turned
