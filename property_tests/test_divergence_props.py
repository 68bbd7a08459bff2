import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import klquant
from klquant import InfeasibleError, reference
from klquant.testing import counts
from strategies import EPS, fewer, vectors
from support.namespaces import JAX, JIT, READ_ONLY, params


@st.composite
def pairs(draw, smallest=0.0):
    """Draw two distributions over the same bins. All entries of the second are positive."""
    size = draw(st.integers(1, 40))
    p = draw(npst.arrays(np.float64, size, elements=st.just(smallest) | st.floats(1e-3, 1e6)))
    assume(p.any())
    return p, draw(npst.arrays(np.float64, size, elements=st.floats(1e-3, 1e6)))


def kl(p, q):
    return float(klquant.kl_divergence(p, q))


def smoothed_by(name, values, eps):
    """Return the smoothed values, or None if that is infeasible."""
    if name == "reference":
        return reference.smooth(values, eps)
    try:
        return klquant.smooth(values, eps=eps)
    except InfeasibleError:
        return None


IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["fast", "reference"])


@IMPLEMENTATIONS
@given(vectors(), EPS)
def test_smoothing_keeps_the_total(implementation, values, eps):
    smoothed = smoothed_by(implementation, values, eps)
    assume(smoothed is not None)
    np.testing.assert_allclose(smoothed.sum(), values.sum(), rtol=1e-13)


@IMPLEMENTATIONS
@given(vectors(), EPS)
def test_smoothing_leaves_no_zero(implementation, values, eps):
    smoothed = smoothed_by(implementation, values, eps)
    assume(smoothed is not None)
    assert (smoothed > 0).all()
    assert (smoothed[values == 0] == eps).all()


@IMPLEMENTATIONS
@given(vectors(min_size=2), EPS)
def test_smoothing_takes_the_same_from_all(implementation, values, eps):
    smoothed = smoothed_by(implementation, values, eps)
    assume(smoothed is not None and values.max() < 1e6)
    loss, expected = (values - smoothed)[values != 0], eps * (values == 0).sum() / (values != 0).sum()
    np.testing.assert_allclose(loss, expected, rtol=0, atol=1e-9)
    assert expected < 1  # `loss` itself may round to 1


@given(vectors(), EPS)
def test_smoothing_is_that_of_the_reference(values, eps):
    fast, expected = smoothed_by("fast", values, eps), smoothed_by("reference", values, eps)
    assert (fast is None) == (expected is None)
    if fast is not None:
        np.testing.assert_array_equal(fast, expected)


@given(vectors().map(lambda values: values + 1), EPS)
def test_values_without_zeros_stay_as_they_are(values, eps):
    np.testing.assert_array_equal(klquant.smooth(values, eps=eps), values)


@given(pairs())
def test_divergence_is_never_negative(pair):
    assert kl(*pair) >= 0
    assert reference.kl_divergence(*pair) >= -1e-15


@given(pairs())
def test_divergence_is_that_of_the_reference(pair):
    assert kl(*pair) == pytest.approx(reference.kl_divergence(*pair), abs=1e-14, rel=1e-14)


@given(vectors(), st.floats(0.01, 100))
def test_divergence_is_zero_between_equal_distributions(values, factor):
    assume(values.any())
    assert kl(values, values) == 0
    assert kl(values, values * factor) <= 1e-15


@given(pairs())
def test_divergence_is_positive_between_distributions_that_differ(pair):
    p, q = (v / v.sum() for v in pair)
    distance = np.abs(p - q).sum()
    assume(distance > 1e-6)
    assert kl(*pair) >= distance**2 / 2 - 1e-14  # Pinsker
    assert kl(*pair) > 0


@given(pairs(), st.integers(-20, 20), st.integers(-20, 20))
def test_divergence_does_not_depend_on_the_totals(pair, first, second):
    p, q = pair
    assert kl(p * 2.0**first, q * 2.0**second) == kl(p, q)


@given(pairs(), st.randoms(use_true_random=False))
def test_divergence_does_not_depend_on_the_order(pair, random):
    order = list(range(len(pair[0])))
    random.shuffle(order)
    p, q = pair
    assert kl(p[order], q[order]) == pytest.approx(kl(p, q), abs=1e-14, rel=1e-14)


@given(pairs())
def test_merging_bins_never_adds_divergence(pair):
    starts = np.arange(0, len(pair[0]), 3)
    assert kl(*(np.add.reduceat(v, starts) for v in pair)) <= kl(*pair) + 1e-14


@given(pairs(smallest=1.0), st.data())
def test_divergence_is_infinite_where_q_lacks_what_p_has(pair, data):
    p, q = pair
    q[data.draw(st.integers(0, len(q) - 1))] = 0
    assume(q.any())
    assert kl(p, q) == math.inf


@pytest.mark.parametrize("xp", params(READ_ONLY, JAX, JIT))
@pytest.mark.parametrize("shape", ["dense", "rounded_weights"])
@fewer()
@given(data=st.data())
def test_every_library_finds_the_same(xp, shape, data):
    p, q = data.draw(counts(33, shape=shape)), data.draw(counts(33, shape=shape)) + 1
    assume(p.any())
    before = p.tobytes(), q.tobytes()
    divergence = xp.call(klquant.kl_divergence, xp.asarray(p), xp.asarray(q))
    assert float(divergence) == pytest.approx(kl(p, q), abs=1e-14, rel=1e-14)
    smoothed = xp.call(klquant.smooth, xp.asarray(q))
    np.testing.assert_array_equal(smoothed, klquant.smooth(q))
    assert (p.tobytes(), q.tobytes()) == before
