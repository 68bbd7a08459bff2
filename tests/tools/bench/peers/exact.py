"""The divergence of one candidate in exact rational arithmetic, with logarithms to 50 digits.

It is free of the rounding of the search and of the loops, so it decides between them. It takes a second where they take
a millisecond.
"""

import functools
import math
from decimal import Decimal, localcontext
from fractions import Fraction

DIGITS = 50


def divergence(hist, half, num_quantized_bins=255, eps=1e-4):
    """Return the divergence of the candidate with this half-width, rounded once; infinity if it is infeasible."""
    values = [Fraction(value) for value in hist.tolist()]
    start, stop = len(values) // 2 - half, len(values) // 2 + half + 1
    p = [sum(values[: start + 1]), *values[start + 1 : stop - 1], sum(values[stop - 1 :])]
    q = _merged([Fraction(0), *values[start + 1 : stop]], p, num_quantized_bins)
    p, q = _smooth(p, Fraction(eps)), _smooth(q, Fraction(eps))
    if p is None or q is None:
        return math.inf
    with localcontext(prec=DIGITS):
        log = functools.cache(lambda ratio: (Decimal(ratio.numerator) / ratio.denominator).ln())
        terms = (_decimal(left) * log(left / right) for left, right in zip(p, q, strict=True))
        return float(sum(terms) / _decimal(sum(p)) + log(sum(q) / sum(p)))


def _merged(sliced, p, levels):
    size, q = len(p) // levels, []
    for j in range(levels):
        stop = (j + 1) * size if j < levels - 1 else len(p)
        filled = [value != 0 for value in p[j * size : stop]]
        mean = sum(sliced[j * size : stop]) / max(sum(filled), 1)
        q.extend(mean if is_filled else Fraction(0) for is_filled in filled)
    return q


def _smooth(values, eps):
    zeros = values.count(0)
    loss = eps * zeros / (len(values) - zeros) if zeros < len(values) else 1
    smoothed = [value - loss if value else eps for value in values]
    return None if loss >= 1 or min(smoothed) <= 0 else smoothed


def _decimal(number):
    return Decimal(number.numerator) / number.denominator
