import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from klquant.backends.rounding import round_adaptively, with_damping


def case(seed, outputs=4, inputs=6, levels=7):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(50, inputs)) @ rng.normal(size=(inputs, inputs))
    weight = rng.normal(size=(outputs, inputs))
    return weight, np.abs(weight).max(axis=1, keepdims=True) / levels, x


def damped(x):
    return with_damping(x.T @ x, len(x))


def errors(codes, weight, scale, products):
    left = codes * scale - weight
    return np.einsum("oi,ij,oj->o", left, products, left)


@given(seed=st.integers(0, 10**6), inputs=st.integers(1, 9))
def test_never_worse_than_to_nearest_and_next_to_the_weight(seed, inputs):
    weight, scale, x = case(seed, inputs=inputs)
    found = round_adaptively(weight, scale, x.T @ x, len(x))
    nearest = np.rint(weight / scale)
    assert (errors(found, weight, scale, damped(x)) <= errors(nearest, weight, scale, damped(x)) * (1 + 1e-9)).all()
    assert (np.abs(found - weight / scale) < 1).all()
    assert np.abs(found).max() == 7


def test_most_rows_reach_the_best_of_all_roundings():
    hits = 0
    for seed in range(40):
        weight, scale, x = case(seed, outputs=1, inputs=5)
        ends = np.stack([np.floor(weight / scale)[0], np.ceil(weight / scale)[0]])
        every = np.array(list(itertools.product(*ends.T)))
        best = min(errors(np.array([one]), weight, scale, damped(x))[0] for one in every)
        found = round_adaptively(weight, scale, x.T @ x, len(x))
        hits += errors(found, weight, scale, damped(x))[0] < best * 1.2
    assert hits > 20


def test_more_inputs_than_a_block_of_the_search(monkeypatch):
    weight, scale, x = case(3, inputs=20)
    whole = round_adaptively(weight, scale, x.T @ x, len(x))
    monkeypatch.setattr("klquant.backends.rounding.BLOCK", 3)
    np.testing.assert_array_equal(round_adaptively(weight, scale, x.T @ x, len(x)), whole)
    assert (whole != np.rint(weight / scale)).any()


def test_one_sample_does_not_say_how_to_round_a_hundred_weights():
    weight, scale, x = case(5, outputs=40, inputs=100)
    x, others = x[:1], x[1:]
    found, nearest = round_adaptively(weight, scale, x.T @ x, 1), np.rint(weight / scale)
    ours, theirs = (errors(codes, weight, scale, others.T @ others).sum() for codes in (found, nearest))
    assert ours < 1.1 * theirs


@pytest.mark.parametrize("scale", [0.0, np.zeros((2, 1))])
def test_a_dead_row_is_zeros(scale):
    assert not round_adaptively(np.full((2, 3), 1e-9), scale, np.eye(3), 9).any()
