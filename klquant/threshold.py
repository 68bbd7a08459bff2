"""The threshold search: all candidates in closed form, then the best ones again bin by bin."""

import math
from types import ModuleType

import numpy as np

from klquant._namespace import Array, at_most, compiled, first_true, from_numpy, map_batch, while_loop
from klquant._result import Threshold, check_found, describe
from klquant._search.bin_by_bin import Search, direct_divergence
from klquant._search.closed_form import closed_form_curve, prepare
from klquant._search.squared_errors import least_error, squared_errors
from klquant._validate import check_equal_bins, check_histogram, check_positive
from klquant.divergence import EPS
from klquant.errors import InvalidInputError

_NEAR = 1e-12  # nats: well above the error of the closed form (`klquant._search` has its budget)
NEAR_TIE = 0.01  # of the least divergence, for `tie_low` and `tie_high` where there is no `tie_width`
_GAIN = 2.0**-52  # nats: a smaller gain is only rounding, and the earlier candidate stays


def optimal_threshold(
    hist: Array,
    edges: Array,
    *,
    num_quantized_bins: int = 255,
    eps: float = EPS,
    min_ratio: float = 0.0,
    one_sided: bool = False,
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
        histograms. To ignore exact zeros, as engines do, set the centre bin to 0 first.
    edges : array, shape (..., num_bins + 1) or (num_bins + 1,), in units of the activation
        Strictly increasing and symmetric about 0. Pass one set of edges for each histogram, or one for all.
    num_quantized_bins : int, odd, at least 3
        Number of levels: 255 for INT8 (-127 .. 127), 15 for INT4.
    eps : float
        The value that replaces a zero when P and Q are smoothed, > 0, in counts.
    min_ratio : float, 0 to 1
        Consider only ``T >= min_ratio * edges[-1]``. This limits the clipping of heavy tails. 0 means no limit.
    one_sided : bool
        Search the histogram of ``|x|`` with ``num_quantized_bins // 2 + 1`` levels. Use it for tensors that are never
        negative.
    tie_width : float, at least 0
        Of the candidates with a divergence up to ``(1 + tie_width)`` times the least, take the one with the least
        expected squared error. The minimum is flat, so T may change a lot with little data: candidates within 1 % often
        span a tenth of T. 0 takes the least divergence itself. Other values need bins of equal width.

    Returns
    -------
    Threshold
        `value` is one of the edges. `tie_low` and `tie_high` say how flat the minimum is. The fields are scalars, or
        arrays of the batch shape, in the library of `hist`. Under ``jax.jit``, if no candidate is feasible, `value` and
        `divergence` are NaN and `index` is -1.

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
    Integer counts are summed exactly. Divergences are computed in float64, also on JAX with 64-bit types off.
    Near-ties are computed again bin by bin; of candidates that are equal within the rounding of float64, the first
    wins.

    The search takes about ``num_bins**2 / (2 * num_quantized_bins)`` logarithms. The histograms of a batch are searched
    one by one (256 at a time on an accelerator), so memory does not grow with the batch. With 8001 bins it is 4 MiB
    with NumPy and 20 MiB with JAX. JAX compiles once for each shape, which takes about 5 s.

    Source: S. Migacz, "8-bit inference with TensorRT", GTC 2017; the details as published with MXNet.

    Examples
    --------
    >>> import numpy as np, klquant
    >>> hist, edges = klquant.histogram(np.random.default_rng(0).laplace(size=100_000), num_bins=2001)
    >>> threshold = klquant.optimal_threshold(hist, edges)
    >>> print(f"{threshold.value:.3f} of {edges[-1]:.3f}")
    10.360 of 11.949
    """
    xp = check_histogram(hist, edges, num_quantized_bins)
    check_positive("eps", eps)
    if not 0 <= min_ratio <= 1:
        raise InvalidInputError(f"`min_ratio` must lie between 0 and 1, got {min_ratio}")
    if not 0 <= tie_width < math.inf:
        raise InvalidInputError(f"`tie_width` must be 0 or positive, and finite, got {tie_width}")
    if tie_width:
        check_equal_bins(edges, "`tie_width`")
    threshold = _search(
        hist,
        edges,
        from_numpy(np.asarray([min_ratio, tie_width or NEAR_TIE], np.float64), xp=xp),
        resolve_ties=tie_width > 0,
        num_quantized_bins=int(num_quantized_bins),
        eps=float(eps),
        one_sided=bool(one_sided),
    )
    return check_found(
        threshold,
        "a feasible candidate, got none: it is empty, all its mass lies in an end bin, "
        "or its non-zero bins are too few or too small",
    )


def divergence_curve(
    hist: Array, edges: Array, *, num_quantized_bins: int = 255, eps: float = EPS, one_sided: bool = False
) -> Array:
    """Return the divergence of every candidate threshold, from the narrowest to the widest.

    Candidate k has half-width ``i = num_quantized_bins // 2 + k`` bins and threshold ``edges[centre + i + 1]``.

    Parameters
    ----------
    hist, edges, num_quantized_bins, eps, one_sided
        As for :func:`optimal_threshold`.

    Returns
    -------
    array, shape (..., num_bins // 2 - num_quantized_bins // 2 + 1), float64, in nats, in the library of `hist`
        +inf for an infeasible candidate.

    Raises
    ------
    InvalidInputError, ArrayTypeError
        As for :func:`optimal_threshold`.

    Notes
    -----
    The values agree with the loops of :mod:`klquant.reference` to 1e-12.

    Examples
    --------
    >>> import numpy as np, klquant
    >>> hist = np.array([1, 3, 9, 0, 7, 4, 0])
    >>> klquant.divergence_curve(hist, np.linspace(-7, 7, 8), num_quantized_bins=3).round(3).tolist()
    [5.353, 1.601, 0.044]
    """
    check_histogram(hist, edges, num_quantized_bins)
    check_positive("eps", eps)
    return _curve(hist, edges, num_quantized_bins=int(num_quantized_bins), eps=float(eps), one_sided=bool(one_sided))


@compiled
def _search(
    hist: Array,
    edges: Array,
    limits: Array,
    *,
    xp: ModuleType,
    resolve_ties: bool,
    num_quantized_bins: int,
    eps: float,
    one_sided: bool,
) -> Threshold:
    min_ratio, width = limits

    def search_one(hist: Array, edges: Array) -> Threshold:
        search = prepare(hist, num_quantized_bins, eps, one_sided, xp=xp)
        curve = closed_form_curve(search, xp=xp)
        candidates = edges[edges.shape[0] - curve.shape[0] :]
        curve = xp.where(candidates < min_ratio * edges[-1], xp.inf, curve)
        index, divergence = _first_minimum(curve, search, xp=xp)
        near = xp.isfinite(curve) & (curve <= divergence * (1 + width) + _NEAR)
        if resolve_ties:
            errors = squared_errors(hist, edges, num_quantized_bins, xp=xp)[-curve.shape[0] :]
            best = least_error(xp.where(near, errors, xp.inf), hist, edges, xp=xp)
            divergence = xp.where((index < 0) | (best == index), divergence, curve[best])
            index = xp.where(index < 0, index, best)
        ends = xp.where(near, candidates, xp.inf).min(), xp.where(near, candidates, -xp.inf).max()
        value, *ties = (xp.where(index < 0, xp.nan, T) for T in (candidates[index], *ends))
        return describe(hist, edges, value, index, divergence, num_quantized_bins=num_quantized_bins, ties=ties, xp=xp)

    return map_batch(search_one, hist, edges, xp=xp)


@compiled
def _curve(hist: Array, edges: Array, *, xp: ModuleType, num_quantized_bins: int, eps: float, one_sided: bool) -> Array:
    def one_curve(hist: Array, _: Array) -> Array:
        return closed_form_curve(prepare(hist, num_quantized_bins, eps, one_sided, xp=xp), xp=xp)

    return map_batch(one_curve, hist, edges, xp=xp)


def _first_minimum(curve: Array, search: Search, *, xp: ModuleType) -> tuple[Array, Array]:
    """Return the index and the divergence of the first minimum; -1 and NaN if no candidate is feasible.

    Candidates within `_NEAR` of the minimum are computed again bin by bin, which decides between them.
    """
    near = xp.isfinite(curve) & (curve <= curve.min() + _NEAR)
    index = xp.arange(curve.shape[0])
    room = at_most(search.values.shape[0], search.sums.filled[-1], xp=xp)

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        last_tried, _, lowest = state
        return (near.sum() > 1) & (lowest > 0) & (near & (index > last_tried)).any()

    def try_next(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        last_tried, best, lowest = state
        k = first_true(near & (index > last_tried), xp=xp)
        divergence = direct_divergence(search, k[None], room, xp=xp)[0]
        better = divergence < lowest - _GAIN
        return k, xp.where(better, k, best), xp.where(better, divergence, lowest)

    lone = near.sum() == 1
    best = xp.where(lone, first_true(near, xp=xp), -1)
    start = (xp.full_like(best, -1), best, xp.where(lone, curve.min(), xp.inf))
    _, best, lowest = while_loop(unfinished, try_next, start, xp=xp)
    return best, xp.where(best < 0, xp.nan, lowest)
