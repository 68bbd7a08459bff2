from math import inf, log, nan

import numpy as np
import pytest

import klquant
from klquant import ArrayTypeError, InfeasibleError, InvalidInputError
from klquant.divergence import smoothing_loss
from support.namespaces import JAX, needs_jax


@pytest.mark.parametrize(
    ("values", "eps", "expected"),
    [
        ([0, 4, 6], 0.5, [0.5, 3.75, 5.75]),
        ([0, 0, 0, 2], 0.25, [0.25, 0.25, 0.25, 1.25]),
        ([3, 1, 2], 0.5, [3, 1, 2]),
        ([0.0, 1.5], 0.75, [0.75, 0.75]),
        ([0, 8], 1e-4, [1e-4, 8 - 1e-4]),
    ],
)
def test_smooth_takes_the_cost_of_zeros_evenly_from_the_others(xp, values, eps, expected):
    smoothed = xp.call(klquant.smooth, xp.asarray(values), eps=eps)
    assert xp.owns(smoothed)
    assert smoothed.dtype == np.float64
    np.testing.assert_allclose(smoothed, expected, rtol=1e-15)


INFEASIBLE = {
    "empty": ([0, 0], 1e-4),
    "would cost 1": ([0, 9], 1.0),
    "would cost more than 1": ([0, 0, 9], 0.6),
    "would leave nothing": ([0, 0.25], 0.25),
    "would leave less": ([0, 0, 9, 0.125], 0.25),
}


@pytest.mark.parametrize(("values", "eps"), INFEASIBLE.values(), ids=INFEASIBLE.keys())
def test_infeasible_smoothing_is_an_error_or_nan_under_jit(xp, values, eps):
    if xp.is_traced:
        np.testing.assert_array_equal(xp.call(klquant.smooth, xp.asarray(values), eps=eps), np.full(len(values), nan))
        return
    with pytest.raises(InfeasibleError, match=rf"`values` cannot be smoothed with eps = {eps}"):
        klquant.smooth(xp.asarray(values), eps=eps)


def test_smooth_computes_in_double_precision(xp):
    smoothed = xp.call(klquant.smooth, xp.asarray([2**40, 0]))
    assert float(smoothed[0]) == 2**40 - 1e-4


@pytest.mark.parametrize(
    ("p", "q", "expected"),
    [
        ([1, 3], [2, 2], log(0.5) / 4 + log(1.5) * 3 / 4),
        ([1, 1], [1, 3], log(2) / 2 + log(2 / 3) / 2),
        ([1, 3], [2, 6], 0.0),
        ([0, 5], [1, 1], log(2)),
        ([0, 1], [0, 1], 0.0),
        ([1, 1], [1, 0], inf),
        ([0.1, 0.2, 0.7], [0.3, 0.6, 2.1], 0.0),
    ],
)
def test_kl_divergence_by_hand(xp, p, q, expected):
    divergence = xp.call(klquant.kl_divergence, xp.asarray(p), xp.asarray(q))
    assert xp.owns(divergence)
    assert divergence.dtype == np.float64
    assert divergence.shape == ()
    np.testing.assert_allclose(divergence, expected, rtol=1e-14, atol=1e-15)


def test_kl_divergence_is_not_symmetric():
    p, q = np.array([1, 9]), np.array([5, 5])
    assert float(klquant.kl_divergence(p, q)) != pytest.approx(float(klquant.kl_divergence(q, p)), rel=0.1)


@pytest.mark.parametrize(
    ("p", "q"),
    [
        ([1, 1], [0, 0]),
        ([0, 0], [1, 1]),
        ([0, 0], [0, 0]),
    ],
)
def test_kl_divergence_needs_mass(xp, p, q):
    p, q = xp.asarray(p), xp.asarray(q)
    if xp.is_traced:
        assert np.isnan(xp.call(klquant.kl_divergence, p, q))
        return
    with pytest.raises(InvalidInputError, match="positive total, got a total of 0"):
        klquant.kl_divergence(p, q)


def test_kl_divergence_refuses_unequal_shapes(xp):
    with pytest.raises(InvalidInputError, match=r"`p` and `q` must have the same shape, got \(2,\) and \(3,\)"):
        xp.call(klquant.kl_divergence, xp.asarray([1, 1]), xp.asarray([1, 1, 1]))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([1, nan], "must be finite, got nan at index 1"),
        ([inf, 1], "must be finite, got inf at index 0"),
        ([1, -2], "must not be negative, got -2 at index 1"),
        ([[1, 2]], r"must be one-dimensional and not empty, got shape \(1, 2\)"),
    ],
)
def test_bad_values_are_refused(eager, bad, message):
    good = eager.asarray([1, 1])
    with pytest.raises(InvalidInputError, match=f"`values` {message}"):
        klquant.smooth(eager.asarray(bad))
    with pytest.raises(InvalidInputError, match=f"`p` {message}"):
        klquant.kl_divergence(eager.asarray(bad), good)
    with pytest.raises(InvalidInputError, match=f"`q` {message}"):
        klquant.kl_divergence(good, eager.asarray(bad))


@pytest.mark.parametrize("eps", [0, -1.0, nan, inf])
def test_smooth_refuses_bad_eps(eager, eps):
    with pytest.raises(InvalidInputError, match=f"`eps` must be positive and finite, got {eps}"):
        klquant.smooth(eager.asarray([1, 0]), eps=eps)


def test_arguments_that_are_not_real_arrays_are_refused():
    with pytest.raises(ArrayTypeError, match="`values` must be a NumPy or JAX array, got list"):
        klquant.smooth([1, 2])
    with pytest.raises(ArrayTypeError, match="`values` must hold real numbers, got dtype complex128"):
        klquant.smooth(np.array([1j]))
    with pytest.raises(ArrayTypeError, match="`q` must be a NumPy or JAX array, got list"):
        klquant.kl_divergence(np.array([1, 2]), [1, 2])


@needs_jax
def test_mixed_libraries_are_refused():
    with pytest.raises(ArrayTypeError, match="`p` from numpy, `q` from jax"):
        klquant.kl_divergence(np.array([1, 2]), JAX.asarray([1, 2]))


def test_smoothing_loss_is_infinite_without_non_zeros():
    loss = smoothing_loss(np.array([0, 1, 2, 4]), 4, 0.5, xp=np)
    np.testing.assert_array_equal(loss, [inf, 1.5, 0.5, 0.0])
