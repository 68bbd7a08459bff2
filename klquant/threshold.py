"""The threshold search: all candidates in closed form, the best of them once more bin by bin."""

from types import ModuleType
from typing import NamedTuple

from klquant._closed_form import closed_form_curve
from klquant._namespace import Array, compiled, is_concrete
from klquant._rescore import first_minimum
from klquant._validate import check_histogram, check_positive
from klquant.divergence import EPS
from klquant.errors import InfeasibleError


class Threshold(NamedTuple):
    """The clipping value found, with where and how good it is; ``float(threshold)`` is the value."""

    value: Array
    """T, in units of the edges and in their dtype."""
    index: Array
    """Which candidate, counted from the narrowest (int32)."""
    divergence: Array
    """D at this candidate, in nats (float64)."""

    def __float__(self) -> float:
        """Return the clipping value."""
        return float(self.value)


def optimal_threshold(hist: Array, edges: Array, *, num_quantized_bins: int = 255, eps: float = EPS) -> Threshold:
    """Find the clipping threshold T that loses least information when [-T, T] becomes `num_quantized_bins` levels.

    For every half-width i the reference P is the histogram inside ``[-T_i, T_i]`` with the outliers added to its
    end bins, Q is what is left of it after merging into the levels, and T is the T_i = ``edges[centre + i + 1]``
    at the first i that minimises KL(P || Q).

    Parameters
    ----------
    hist : array, shape (num_bins,), integer counts (or weights) >= 0
        The number of bins is odd and at least `num_quantized_bins`. To ignore exact zeros, as engines do, set the
        centre bin to 0 first.
    edges : array, shape (num_bins + 1,), in units of the activation
        Strictly increasing and symmetric about 0.
    num_quantized_bins : int, odd, at least 3
        Number of levels: 255 for INT8 (-127 .. 127).
    eps : float
        What a zero becomes in the smoothing, in counts.

    Returns
    -------
    Threshold
        `value` (one of the edges), `index` and `divergence`: scalars in the library of `hist`.
        Under ``jax.jit`` `value` and `divergence` are NaN where no candidate is feasible, `index` is -1.

    Raises
    ------
    InfeasibleError
        If no candidate is feasible: an empty histogram, or nearly so.
    InvalidInputError
        For an even or too small number of bins, edges of another length, not increasing or not symmetric, for NaN,
        infinite or negative counts and totals from 2**63 on.
    ArrayTypeError
        For lists, torch tensors, arrays of different libraries, complex numbers.

    Notes
    -----
    Integer counts are summed exactly, divergences are computed in float64, also on JAX with 64-bit types off.
    Near-ties are compared bin by bin; one that is better by less than the rounding of float64 does not replace an
    earlier one. Cost: O(num_bins * num_quantized_bins).
    Source: S. Migacz, "8-bit inference with TensorRT", GTC 2017; the details as published with MXNet.

    Examples
    --------
    >>> import numpy as np, klquant
    >>> hist, edges = klquant.histogram(np.random.default_rng(0).laplace(size=100_000), num_bins=2001)
    >>> threshold = klquant.optimal_threshold(hist, edges)
    >>> print(f"{threshold.value:.3f} of {edges[-1]:.3f}")
    8.171 of 11.361
    """
    check_histogram(hist, edges, num_quantized_bins)
    check_positive("eps", eps)
    threshold = _search(hist, edges, num_quantized_bins=int(num_quantized_bins), eps=float(eps))
    if is_concrete(threshold.index) and int(threshold.index) < 0:
        raise InfeasibleError(
            f"`hist` must have a feasible candidate, got none among half-widths {num_quantized_bins // 2} to "
            f"{hist.shape[0] // 2}: it is empty, or all its mass lies in one end bin, or its weights are below {eps}"
        )
    return threshold


def divergence_curve(hist: Array, edges: Array, *, num_quantized_bins: int = 255, eps: float = EPS) -> Array:
    """Return the divergence D_i of every candidate threshold, from the narrowest to the widest.

    Candidate k has half-width ``i = num_quantized_bins // 2 + k`` bins and threshold ``edges[centre + i + 1]``.

    Parameters
    ----------
    hist, edges, num_quantized_bins, eps
        As for :func:`optimal_threshold`.

    Returns
    -------
    array, shape (num_bins // 2 - num_quantized_bins // 2 + 1,), float64, in nats, in the library of `hist`
        +inf where a candidate is infeasible.

    Raises
    ------
    InvalidInputError, ArrayTypeError
        As for :func:`optimal_threshold`.

    Notes
    -----
    Agrees with the loops of :mod:`klquant.reference` to 1e-12.

    Examples
    --------
    >>> import numpy as np, klquant
    >>> hist = np.array([1, 3, 9, 0, 7, 4, 0])
    >>> klquant.divergence_curve(hist, np.linspace(-7, 7, 8), num_quantized_bins=3).round(3).tolist()
    [inf, 0.125, 0.227]
    """
    check_histogram(hist, edges, num_quantized_bins)
    check_positive("eps", eps)
    return _curve(hist, num_quantized_bins=int(num_quantized_bins), eps=float(eps))


@compiled
def _search(hist: Array, edges: Array, *, xp: ModuleType, num_quantized_bins: int, eps: float) -> Threshold:
    curve = closed_form_curve(hist, num_quantized_bins, eps, xp=xp)
    index, divergence = first_minimum(curve, hist, num_quantized_bins, eps, xp=xp)
    if edges.dtype.kind in "iu":
        edges = edges.astype(xp.float64)
    feasible = xp.isfinite(divergence)
    stop = hist.shape[0] // 2 + num_quantized_bins // 2 + 1 + index
    return Threshold(
        xp.where(feasible, edges[stop], xp.asarray(xp.nan, dtype=edges.dtype))[()],
        xp.where(feasible, index, -1).astype(xp.int32),
        xp.where(feasible, divergence, xp.nan)[()],
    )


@compiled
def _curve(hist: Array, *, xp: ModuleType, num_quantized_bins: int, eps: float) -> Array:
    return closed_form_curve(hist, num_quantized_bins, eps, xp=xp)
