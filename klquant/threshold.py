"""The threshold search: all candidates in closed form, then the best ones again bin by bin."""

import functools
import math
from types import ModuleType
from typing import NamedTuple

from klquant._namespace import Array, compiled, first_and_number, first_true, is_concrete, map_batch, scalar_argument
from klquant._result import Threshold, check_found, describe
from klquant._search.bin_by_bin import NEAR, Search, near_minimum, settled_curve
from klquant._search.closed_form import closed_form_curve, prepare
from klquant._search.squared_errors import least_error, squared_errors
from klquant._validate import (
    check_equal_bins,
    check_flag,
    check_inputs,
    check_number,
    check_positive,
    has_equal_bins,
    is_sound,
)
from klquant.divergence import EPS
from klquant.errors import InvalidInputError

NEAR_TIE = 0.01  # of the least divergence, for `tie_low` and `tie_high` where there is no `tie_width`
ROUNDING = 2.0**-52  # nats: candidates that are closer to the minimum are equal to it, and the first one wins


def optimal_threshold(  # noqa: PLR0913 the options of the search
    hist: Array,
    edges: Array,
    *,
    num_quantized_bins: int | None = None,
    num_bits: int | None = None,
    eps: float = EPS,
    min_ratio: float = 0.0,
    one_sided: bool = False,
    skip_zeros: bool = False,
    tie_width: float = 0.0,
) -> Threshold:
    """Find the clipping threshold T that loses the least information when [-T, T] becomes `num_quantized_bins` levels.

    Candidate i keeps i bins on each side of the centre bin, so ``T_i = edges[centre + i + 1]``. Its reference P is
    the histogram inside ``[-T_i, T_i]``, with the outliers added to the two end bins. Its Q is the same window after
    merging into the levels. T is the T_i of the first i that minimises KL(P || Q).

    Parameters
    ----------
    hist : array, shape (..., num_bins), integer counts (or weights) >= 0
        The number of bins must be odd and at least `num_quantized_bins`. Leading dimensions are a batch of
        histograms.
    edges : array, shape (..., num_bins + 1) or (num_bins + 1,), in units of the activation
        Strictly increasing and symmetric about 0. Pass one set of edges for each histogram, or one for all.
    num_quantized_bins : int, odd, at least 3
        Number of levels: 255 (the default) for INT8 (-127 .. 127), 15 for INT4.
    num_bits : int, 2 to 32
        In place of `num_quantized_bins`: ``2**num_bits - 1`` levels.
    eps : float
        The value that replaces a zero when P and Q are smoothed, > 0, in counts.
    min_ratio : float, 0 to 1
        Consider only ``T >= min_ratio * edges[-1]``. This limits the clipping of heavy tails. 0 means no limit.
    one_sided : bool
        Search the histogram of ``|x|`` with ``num_quantized_bins // 2 + 1`` levels. Use it for tensors that are never
        negative, with `skip_zeros`: if half of the values are zeros, T may clip a tenth of the others.
    skip_zeros : bool
        Ignore the counts of the centre bin, as engines do. Zeros are exact at any T.
    tie_width : float, at least 0, not traced
        Of the candidates with a divergence up to ``(1 + tie_width)`` times the least, take the one with the least
        expected squared error. The minimum is flat, so T may change a lot with little data: candidates within 1 % often
        span a tenth of T. 0 takes the least divergence itself. Other values need bins of equal width.

    Returns
    -------
    Threshold
        `value` is one of the edges. `tie_low` and `tie_high` say how flat the minimum is. The fields are scalars, or
        arrays of the batch shape, in the library of `hist`. Under ``jax.jit``, if no candidate is feasible, or an input
        or option is not valid, `value` and `divergence` are NaN and `index` is -1.

    Raises
    ------
    InfeasibleError
        If no candidate is feasible, for example because the histogram is empty.
    InvalidInputError
        If the number of bins is even or too small; if `edges` has the wrong length, does not increase or is not
        symmetric; if a count is NaN, infinite or negative; if the total is 2**63 or more; if an option is out of
        range.
    ArrayTypeError
        If the arrays are not NumPy or JAX arrays of real numbers, or come from different libraries.

    Notes
    -----
    Integer counts are summed exactly. Divergences are computed in float64, also on JAX with 64-bit types off. `eps` and
    `min_ratio` may be traced by JAX.
    Near-ties are computed again bin by bin; of candidates that are equal within the rounding of float64, the first
    wins.

    The search takes about ``num_bins**2 / (2 * num_quantized_bins)`` logarithms. The histograms of a batch are searched
    one by one (256 at a time on an accelerator), so memory does not grow with the batch. With 8001 bins it is 4 MiB
    with NumPy and 20 MiB inside ``jax.jit``, where JAX compiles once for each shape, which takes about 2 s.

    Source: S. Migacz, "8-bit inference with TensorRT", GTC 2017; the details as published with MXNet.

    Examples
    --------
    >>> import numpy as np, klquant
    >>> hist, edges = klquant.histogram(np.random.default_rng(0).laplace(size=100_000), num_bins=2001)
    >>> threshold = klquant.optimal_threshold(hist, edges)
    >>> print(f"{threshold.value:.3f} of {edges[-1]:.3f}")
    10.360 of 11.949
    """
    hist, levels = check_inputs(hist, edges, num_quantized_bins, num_bits, skip_zeros)
    eps, ratio = check_positive("eps", eps), check_number("min_ratio", min_ratio)
    if is_concrete(ratio) and not 0 <= ratio <= 1:
        raise InvalidInputError(f"`min_ratio` must lie between 0 and 1, got {min_ratio}")
    width = float(check_number("tie_width", tie_width))
    if not 0 <= width < math.inf:
        raise InvalidInputError(f"`tie_width` must be 0 or positive, and finite, got {tie_width}")
    if width:
        check_equal_bins(edges, "`tie_width`")
    threshold = _search(
        hist,
        edges,
        scalar_argument("eps", eps, hist=hist),
        scalar_argument("min_ratio", ratio, hist=hist),
        options=_Options(levels, check_flag("one_sided", one_sided), width),
    )
    return check_found(
        threshold,
        "a feasible candidate, got none: it is empty, all its mass lies in an end bin, "
        "or its non-zero bins are too few or too small",
    )


def divergence_curve(
    hist: Array,
    edges: Array,
    *,
    num_quantized_bins: int | None = None,
    num_bits: int | None = None,
    eps: float = EPS,
    one_sided: bool = False,
    skip_zeros: bool = False,
) -> Array:
    """Return the divergence of every candidate threshold, from the narrowest to the widest.

    Candidate k has half-width ``i = num_quantized_bins // 2 + k`` bins and threshold ``edges[centre + i + 1]``.

    Parameters
    ----------
    hist, edges, num_quantized_bins, num_bits, eps, one_sided, skip_zeros
        As for :func:`optimal_threshold`.

    Returns
    -------
    array, shape (..., num_bins // 2 - num_quantized_bins // 2 + 1), float64, in nats, in the library of `hist`
        +inf for an infeasible candidate. Under ``jax.jit`` all are NaN if an input or option is not valid.

    Raises
    ------
    InvalidInputError, ArrayTypeError
        As for :func:`optimal_threshold`.

    Notes
    -----
    The values agree with the loops of :mod:`klquant.reference` to 1e-12, for counts and for weights that span up to 20
    powers of ten.

    Examples
    --------
    >>> import numpy as np, klquant
    >>> hist = np.array([1, 3, 9, 0, 7, 4, 0])
    >>> klquant.divergence_curve(hist, np.linspace(-7, 7, 8), num_quantized_bins=3).round(3).tolist()
    [5.353, 1.601, 0.044]
    """
    hist, levels = check_inputs(hist, edges, num_quantized_bins, num_bits, skip_zeros)
    eps = check_positive("eps", eps)
    one_sided = check_flag("one_sided", one_sided)
    traced = scalar_argument("eps", eps, hist=hist)
    return _curve(hist, edges, traced, num_quantized_bins=levels, one_sided=one_sided)


class _Options(NamedTuple):
    """What JAX compiles a search for."""

    num_quantized_bins: int
    one_sided: bool
    tie_width: float


@functools.partial(compiled, by_row=True)
def _search(
    hist: Array,
    edges: Array,
    eps: Array,
    min_ratio: Array,
    *,
    xp: ModuleType,
    options: _Options,
) -> Threshold:
    levels, one_sided, tie_width = options
    eps = xp.where((min_ratio >= 0) & (min_ratio <= 1), eps.astype(xp.float64), xp.nan)

    def search_one(hist: Array, edges: Array) -> Threshold:
        search = prepare(hist, levels, eps, one_sided, xp=xp)
        candidates = edges[edges.shape[0] - search.layout.candidates :]
        admitted = (candidates >= min_ratio * edges[-1]) & (not tie_width or has_equal_bins(edges, xp=xp))
        curve = _sound_curve(search, hist, edges, admitted, ties=True, xp=xp)
        index, divergence = _first_minimum(curve, xp=xp)
        near = curve <= divergence * (1 + (tie_width or NEAR_TIE)) + NEAR
        if tie_width:
            errors = squared_errors(hist, edges, levels, xp=xp)[-curve.shape[0] :]
            best = least_error(xp.where(near, errors, xp.inf), hist, edges, xp=xp)
            divergence = xp.where((index < 0) | (best == index), divergence, curve[best])
            index = xp.where(index < 0, index, best)
        last = curve.shape[0] - 1
        low, high = xp.minimum(first_true(near, xp=xp), last), last - first_true(near[::-1], xp=xp)
        value, *ties = (xp.where(index < 0, xp.nan, candidates[k]) for k in (index, low, high))
        return describe(hist, edges, value, index, divergence, num_quantized_bins=levels, ties=ties, xp=xp)

    return map_batch(search_one, hist, edges, xp=xp)


@functools.partial(compiled, by_row=True)
def _curve(hist: Array, edges: Array, eps: Array, *, xp: ModuleType, num_quantized_bins: int, one_sided: bool) -> Array:
    def one_curve(hist: Array, edges: Array) -> Array:
        search = prepare(hist, num_quantized_bins, eps.astype(xp.float64), one_sided, xp=xp)
        return _sound_curve(search, hist, edges, xp.asarray(True), ties=False, xp=xp)

    return map_batch(one_curve, hist, edges, xp=xp)


def _sound_curve(search: Search, hist: Array, edges: Array, admitted: Array, *, ties: bool, xp: ModuleType) -> Array:
    """Return the curve, +inf where a candidate is not admitted.

    All are NaN for counts, edges or an eps that the checks would have refused if they were not traced.
    """
    sound = is_sound(hist, edges, xp=xp) & (search.eps > 0)
    curve, coarse = closed_form_curve(search, xp=xp)
    curve = xp.where(sound, xp.where(admitted, curve, xp.inf), xp.nan)
    return settled_curve(curve, search, coarse & admitted & sound, ties=ties, xp=xp)


def _first_minimum(curve: Array, *, xp: ModuleType) -> tuple[Array, Array]:
    """Return the index and the divergence of the first minimum, up to rounding; -1 and NaN if none is feasible."""
    first, number = first_and_number(near_minimum(curve, ROUNDING, xp=xp), xp=xp)
    index = xp.where(number > 0, first, -1)
    return index, xp.where(index < 0, xp.nan, curve[index])
