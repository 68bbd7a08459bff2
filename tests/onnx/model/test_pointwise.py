"""The functions that read a tensor, in the spellings that exporters write."""

import math

import numpy as np
import pytest

from klquant.backends.onnx import prepare
from klquant.backends.onnx.model.pointwise import find_curves
from support.onnx_models import build

POINTS = np.linspace(-12, 12, 97)
ONE, HALF, SIX, THREE, ROOT = (np.float32(value) for value in (1, 0.5, 6, 3, 2**0.5))
ERF = np.vectorize(math.erf)


def silu(x):
    return x / (1 + np.exp(-x))


def hard_swish(x):
    return x * np.clip(x + 3, 0, 6) / 6


def gelu(x):
    return x * (1 + ERF(x / 2**0.5)) / 2


SPELLINGS = {
    "silu": ("s = Sigmoid(c) y = Mul(c, s)", silu, {}),
    "hard_swish": ("y = HardSwish(c)", hard_swish, {}),
    "its_parts": ("s = HardSigmoid<alpha=0.16666667, beta=0.5>(c) y = Mul(s, c)", hard_swish, {}),
    "add_clip_mul_div": (
        "a = Add(c, three) b = Clip(a, zero, six) m = Mul(c, b) y = Div(m, six)",
        hard_swish,
        {"three": np.array([3], np.float32), "zero": np.float32(0), "six": SIX},
    ),
    "add_clip_div_mul": (
        "a = Add(c, three) b = Clip(a, zero, six) d = Div(b, six) y = Mul(d, c)",
        hard_swish,
        {"three": THREE, "zero": np.float32(0), "six": SIX},
    ),
    "gelu": (
        "d = Div(c, root) e = Erf(d) o = Add(e, one) h = Mul(c, half) y = Mul(h, o)",
        gelu,
        {"root": ROOT, "one": ONE, "half": HALF},
    ),
    "tanh": ("y = Tanh(c)", np.tanh, {}),
    "leaky": ("y = LeakyRelu<alpha=0.1>(c)", lambda x: np.where(x > 0, x, 0.1 * x), {}),
}


def curve_of(body, **constants):
    model = build("float[n, 3, 4, 4] x", "float z", f"c = Conv(x, w) {body} z = Conv(y, v)", w=(3, 3, 1, 1),
                  v=(3, 3, 1, 1), **constants)  # fmt: skip
    return find_curves(prepare(model), {"c": POINTS}).get("c")


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_a_function(name):
    body, function, constants = SPELLINGS[name]
    found = curve_of(body, **constants)
    assert found.values.shape == (1, len(POINTS))
    np.testing.assert_allclose(found.values[0], function(POINTS), atol=1e-5)
    np.testing.assert_allclose(found.at(np.array([0.1]))[0], function(np.array([0.1])), atol=1e-2)


def test_several_functions_count_each():
    found = curve_of("s = Sigmoid(c) t = Tanh(c) y = Concat<axis=1>(s, t) u = Conv(t, w)")
    np.testing.assert_allclose(found.values, [1 / (1 + np.exp(-POINTS)), np.tanh(POINTS)], atol=1e-5)


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        ("s = Sigmoid(c) y = Mul(x, s) u = Add(c, x)", {}),
        ("y = Mul(c, g)", {"g": np.ones((3, 1, 1), np.float32)}),
        ("y = MaxPool<kernel_shape=[1,1]>(c)", {}),
        ("y = Softmax(c)", {}),
    ],
)
def test_what_else_reads_a_tensor_rules_functions_out(body, constants):
    assert curve_of(body, **constants) is None


def test_a_residual_around_the_function_is_a_function_too():
    found = curve_of("s = Sigmoid(c) m = Mul(c, s) y = Add(m, c)")
    np.testing.assert_allclose(found.values[0], silu(POINTS) + POINTS, atol=1e-4)


def test_outputs_of_the_model_are_read_themselves():
    model = build("float[n, 3, 4, 4] x", "float c, float y", "c = Conv(x, w) y = Sigmoid(c)", w=(3, 3, 1, 1))
    assert find_curves(prepare(model), {"c": POINTS}) == {}


def test_values_without_limit_give_no_curve():
    assert curve_of("y = Exp(c)") is not None
    assert curve_of("y = Reciprocal(c)") is None
    assert curve_of("y = Sqrt(c)") is None
