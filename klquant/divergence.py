"""Smoothing of zeros and the Kullback-Leibler divergence."""

from types import ModuleType

import numpy as np

from klquant._namespace import Array, array_namespace, compiled, in_float64, is_concrete, scalar_argument
from klquant._validate import check_positive, check_vector, is_sound
from klquant.errors import InfeasibleError, InvalidInputError

EPS = 1e-4  # counts: smoothing replaces a zero by this


def smooth(values: Array, *, eps: float = EPS) -> Array:
    """Replace zeros by `eps`, and subtract the same amount from every other entry to keep the total.

    With z zeros and r non-zeros, each non-zero loses ``eps * z / r``.

    Parameters
    ----------
    values : array, shape (n,), counts or weights >= 0
    eps : float
        The value that replaces a zero, > 0, in units of `values`.

    Returns
    -------
    array, shape (n,), float64, in the library of `values`
        All entries are positive. Under ``jax.jit`` all are NaN if the smoothing is infeasible.

    Raises
    ------
    InfeasibleError
        If all entries are zero, if ``eps * z / r >= 1``, or if an entry would become 0 or negative.
    InvalidInputError
        If an entry is NaN, infinite or negative, or `values` is empty or not one-dimensional.
    ArrayTypeError
        If `values` is not a NumPy or JAX array of real numbers.

    Notes
    -----
    Source: TensorRT-style calibration as published with MXNet (`_smooth_distribution`), here in float64.

    Examples
    --------
    >>> import numpy as np, klquant
    >>> klquant.smooth(np.array([0, 4, 6]), eps=0.5).tolist()
    [0.5, 3.75, 5.75]
    """
    array_namespace(values=values)
    check_vector("values", values)
    number = check_positive("eps", eps)
    smoothed = _smooth(values, scalar_argument("eps", number, values=values))
    if is_concrete(smoothed) and np.isnan(smoothed[0]):
        raise InfeasibleError(f"`values` cannot be smoothed with eps = {eps}: too few or too small non-zero entries")
    return smoothed


def kl_divergence(p: Array, q: Array) -> Array:
    """Return the Kullback-Leibler divergence KL(p / sum p || q / sum q), in nats.

    It is never negative, and 0 for equal distributions.

    Parameters
    ----------
    p, q : array, shape (n,), counts or weights >= 0 with a positive total

    Returns
    -------
    float64 scalar, in nats, in the library of `p`
        Entries with p = 0 add nothing. The result is +inf if p > 0 and q = 0 anywhere. Under ``jax.jit`` it is NaN if
        a total is 0.

    Raises
    ------
    InvalidInputError
        If an entry is NaN, infinite or negative, a total is 0, or the shapes differ.
    ArrayTypeError
        If the arrays are not NumPy or JAX arrays of real numbers, or come from different libraries.

    Notes
    -----
    Computed in float64. Source: S. Kullback, R. Leibler, "On information and sufficiency" (1951).

    Examples
    --------
    >>> import numpy as np, klquant
    >>> float(klquant.kl_divergence(np.array([1, 1]), np.array([1, 1])))
    0.0
    """
    array_namespace(p=p, q=q)
    check_vector("p", p)
    check_vector("q", q)
    if p.shape != q.shape:
        raise InvalidInputError(f"`p` and `q` must have the same shape, got {tuple(p.shape)} and {tuple(q.shape)}")
    divergence = _kl_divergence(p, q)
    if is_concrete(divergence) and np.isnan(divergence):
        raise InvalidInputError("`p` and `q` must each have a positive total, got a total of 0")
    return divergence


def smoothing_loss(num_nonzero: Array, num_total: Array, eps: Array, *, xp: ModuleType) -> Array:
    """Return eps1, the amount that every non-zero loses; +inf if there is no non-zero."""
    paying = xp.maximum(num_nonzero, 1)
    return xp.where(num_nonzero > 0, eps * (num_total - num_nonzero) / paying, xp.inf)


@compiled
def _smooth(values: Array, eps: Array, *, xp: ModuleType) -> Array:
    values, eps = in_float64(values, xp=xp).astype(xp.float64), eps.astype(xp.float64)
    sound = is_sound(values, xp=xp) & (eps > 0)
    nonzero = values > 0
    loss = smoothing_loss(nonzero.sum(), values.shape[0], eps, xp=xp)
    smoothed = xp.where(nonzero, values - loss, eps)
    return xp.where(sound & (loss < 1) & (smoothed > 0).all(), smoothed, xp.nan)


@compiled
def _kl_divergence(p: Array, q: Array, *, xp: ModuleType) -> Array:
    p, q = (in_float64(v, xp=xp).astype(xp.float64) for v in (p, q))
    defined = (p.sum() > 0) & (q.sum() > 0) & is_sound(p, xp=xp) & is_sound(q, xp=xp)
    p, q = p / p.sum(), q / q.sum()
    terms = xp.where(p > 0, p * xp.log(xp.where(p > 0, p / q, 1.0)), 0.0)
    return xp.where(defined, xp.maximum(terms.sum(), 0.0), xp.nan)[()]  # rounding may give -1e-17 for equal p and q
