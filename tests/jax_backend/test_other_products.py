"""A function whose products depend on shapes or flags: another product may have the same name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klquant.backends.jax import calibrate, quantize, requantize, sensitivity
from klquant.errors import InvalidInputError
from support.jax_networks import random_batches, sqnr_db

pytestmark = pytest.mark.filterwarnings("ignore:layer `[^`]*`. (T =|expected SQNR):klquant.errors.CalibrationWarning")
RANDOM = np.random.default_rng(0)
A, B = RANDOM.standard_normal((2, 16, 16)).astype(np.float32) / 4
PARAMS = {"q": A, "o": B}
[X] = random_batches(12)


def swapped(_, x):
    return (x @ A) @ B if len(x) > 5 else (x @ B) @ A


def turned(params, x):
    return x @ (params["q"] if len(x) > 5 else jnp.tanh(params["q"]).T)


def ordered(params, x):
    first, last = ("q", "o") if len(x) > 5 else ("o", "q")
    return (x @ params[first]) @ params[last]


def attention(params, x, longer):
    if longer:
        x = x + jax.nn.softmax(x @ x.T / 16) @ x
    y = x @ params["q"]
    return (jax.nn.softmax(y @ y.T / 16) @ x) @ params["o"]


@pytest.mark.parametrize("function", [swapped, turned, ordered])
def test_other_shapes_with_other_products_are_errors(function):
    result = quantize(function, PARAMS, [X])
    assert sqnr_db(function(PARAMS, X), result.function(PARAMS, X)) > 25
    assert sqnr_db(function(PARAMS, X[:7]), result.function(PARAMS, X[:7])) > 25
    with pytest.raises(InvalidInputError, match=r"`(dot_general|q)`: expected the product that was calibrated, got"):
        result.function(PARAMS, X[:3])
    with pytest.raises(InvalidInputError, match=r"batch 1: layer `(dot_general|q)`: expected the product"):
        calibrate(function, PARAMS, [X, X[:3]])
    with pytest.raises(InvalidInputError, match="must be quantized for each of them"):
        requantize(function, PARAMS, X, result.calibration, correction_batches=[X[:3]])


def test_flags_with_other_products_are_errors():
    result = quantize(attention, PARAMS, [(X, True)])
    with pytest.raises(InvalidInputError, match="`dot_general`: expected the product that was calibrated, got `q`"):
        result.function(PARAMS, X, False)
    shorter = quantize(attention, PARAMS, [(X, False)])
    with pytest.raises(InvalidInputError, match="`q`: expected the product that was calibrated, got `dot_general`"):
        shorter.function(PARAMS, X, True)
    with pytest.raises(InvalidInputError, match=r"`dot_general:2.lhs`: expected the function that was calibrated"):
        requantize(attention, PARAMS, (X, False), result.calibration)
    with pytest.raises(InvalidInputError, match=r"`dot_general:2.lhs`: expected the function that was calibrated"):
        sensitivity(attention, PARAMS, result.calibration, [(X, False)])


def test_what_stays_in_floating_point_may_change():
    def function(params, x):
        return (jnp.tri(len(x)) @ x) @ params["q"]  # a weight that depends on the number of rows

    result = quantize(function, PARAMS, [X, X[:5]], exclude="dot_general")
    assert sqnr_db(function(PARAMS, X[:3]), result.function(PARAMS, X[:3])) > 25


def test_other_types_are_the_same_products():
    def function(params, x):
        scaled = jax.jit(lambda w: jnp.tanh(w.T) * params["gain"])(params["q"].astype(x.dtype))
        return x @ scaled @ params["o"].astype(x.dtype)

    params = {**PARAMS, "gain": np.float32(2)}
    result = quantize(function, params, [X])
    same = result.function(params, jnp.asarray(X, jnp.float16))
    assert sqnr_db(function(params, X), same) > 25
    assert jax.vmap(result.function, (None, 0))(params, X[None]).shape == (1, 12, 16)
