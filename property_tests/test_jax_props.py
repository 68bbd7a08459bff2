"""Random functions: interpreting them changes nothing, INT8 equals its simulation, and batches may be split anyhow."""

import functools
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from klquant.backends.jax import calibrate, quantize, requantize
from klquant.backends.jax.model.arguments import split
from klquant.backends.jax.model.interpretation import without_rule
from klquant.backends.jax.model.tracing import program_of
from klquant.backends.settings import CRITERIA
from klquant.errors import CalibrationWarning

WIDTH = 5
STEPS = (
    "dense",
    "left",
    "relu",
    "tanh",
    "scan",
    "while",
    "branch",
    "jit",
    "remat",
    "attention",
    "conv",
    "grad",
    "bias",
)
few = settings(max_examples=6, deadline=None)  # each one compiles its own programs


class Network(NamedTuple):
    """A function that applies some steps in turn, and its weights."""

    steps: tuple[str, ...]
    params: dict[str, np.ndarray]
    inputs: np.ndarray
    squash: Callable[..., jax.Array] = jnp.tanh

    def __call__(self, params, x):
        for number, step in enumerate(self.steps):
            x = apply(step, params[f"{number}"], x, self.squash)
        return x


def apply(step, w, x, squash):
    """Return what one step makes of a matrix, of the same shape."""
    return {
        "dense": lambda: x @ w[0],
        "left": lambda: (w[0] @ x.T).T,
        "relu": lambda: jax.nn.relu(x),
        "tanh": lambda: squash(x),
        "scan": lambda: lax.scan(lambda c, v: (squash(c @ v), None), x, w)[0],
        "while": lambda: lax.while_loop(lambda c: c[1] < 2, lambda c: (squash(c[0] @ w[0]), c[1] + 1), (x, 0))[0],
        "branch": lambda: lax.cond(x.sum() > 0, lambda x: x @ w[0], lambda x: x @ w[1] + 1, x),
        "jit": lambda: jax.jit(lambda x: squash(x @ w[1]))(x),
        "remat": lambda: jax.checkpoint(lambda x: squash(x @ w[0]))(x),
        "attention": lambda: jax.nn.softmax(x @ x.T, axis=-1) @ x,
        "conv": lambda: lax.conv_general_dilated(x[:, None, :], w[:1, :1, :3], (1,), "SAME")[:, 0, :],
        "grad": lambda: jax.grad(lambda x: (jnp.tanh(x @ w[0]) ** 2).sum())(x),
        "bias": lambda: x + w[0, 0],
    }[step]()


@st.composite
def networks(draw, steps=STEPS):
    chosen = tuple(draw(st.lists(st.sampled_from(steps), min_size=1, max_size=4), label="steps"))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    params = {f"{k}": rng.standard_normal((2, WIDTH, WIDTH)).astype(np.float32) for k in range(len(chosen))}
    rows = draw(st.integers(1, 9), label="rows")
    return Network(("dense", *chosen), {"0": params["0"], **{f"{k + 1}": w for k, w in enumerate(params.values())}},
                   rng.standard_normal((rows, WIDTH)).astype(np.float32))  # fmt: skip


@few
@given(networks())
def test_interpreting_changes_no_bit(network):
    program = program_of(network, network.params, (network.inputs,))
    arrays = [*split(network.params).arrays, network.inputs]
    [found] = jax.jit(lambda *arrays: without_rule(program.jaxpr, program.sites, arrays))(*arrays)
    np.testing.assert_array_equal(found, jax.jit(network.__call__)(network.params, network.inputs))
    assert program.sites


@few
@given(networks(steps=("relu", "tanh", "bias")), st.sampled_from(["dense", "left", "conv"]), st.booleans())
def test_int8_is_its_simulation_up_to_rounding(network, product, shifted):
    """With one product no rounding is followed by another."""
    x = np.abs(network.inputs) if shifted else network.inputs  # has zero points
    network = network._replace(steps=(product, *network.steps[1:]), inputs=x)
    options = {"zero_points": True}
    int8 = quantize(network, network.params, [x], criterion="max", num_bins=255, correct_bias=True, **options)
    same = requantize(network, network.params, x, int8.calibration, form="simulate", correction_batches=[x], **options)
    found, expected = (f.function(network.params, x) for f in (int8, same))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@few
@given(networks(steps=("dense", "left", "relu", "tanh", "scan", "while", "branch", "jit", "remat", "conv", "bias")))
def test_int8_is_its_simulation_if_all_sums_are_exact(network):
    """All scales are 1/64, and each channel of each weight has the level 127."""
    diagonal = 127 * np.eye(WIDTH, dtype=np.float32)
    levels = {name: np.clip(np.round(w * 40), -127, 127) for name, w in network.params.items()}
    params = {name: np.where(diagonal, diagonal, w) / 64 for name, w in levels.items()}
    network = network._replace(params=params, squash=lambda x: jnp.clip(x, -1.5, 1.5))
    options = {"num_bins": 255, "overrides": {"*": {"threshold": 127 / 64}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        int8 = quantize(network, params, [network.inputs], **options)
        same = requantize(network, params, network.inputs, int8.calibration, form="simulate")
    assert {layer.scale for layer in int8.thresholds.values()} == {1 / 64}
    np.testing.assert_array_equal(*(f.function(params, network.inputs) for f in (int8, same)))


@few
@given(networks(), st.integers(0, 9), st.sampled_from([1, 2]))
def test_the_split_of_the_data_does_not_matter(network, cut, passes):
    """Rows are independent in all steps but two."""
    steps = tuple("tanh" if step in ("attention", "branch", "grad") else step for step in network.steps)
    network, x = network._replace(steps=steps), network.inputs
    parts = [part for part in (x[:cut], x[cut:]) if len(part)]
    options = {"criterion": "max", "num_bins": 255, "passes": passes, "include": "0"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        whole, split_up = (calibrate(network, network.params, data, **options) for data in ([x], parts))
    np.testing.assert_array_equal(whole.histograms["0"].hist, split_up.histograms["0"].hist)
    assert whole.thresholds["0"].threshold == split_up.thresholds["0"].threshold


@few
@given(st.lists(st.integers(2, 6), min_size=2, max_size=4), st.integers(0, 2**32 - 1), st.sampled_from(CRITERIA))
def test_thresholds_are_those_of_the_pytorch_backend(sizes, seed, criterion):
    """All values are multiples of 1/64 at most, so both frameworks compute the same activations, bit for bit."""
    torch = pytest.importorskip("torch")
    from klquant.backends import torch as torch_backend

    rng = np.random.default_rng(seed)
    x = rng.integers(-20, 20, (64, sizes[0])).astype(np.float32) / 4
    weights = [rng.integers(-8, 9, pair).astype(np.float32) / 4 for pair in pairwise(sizes)]
    layers = [torch.nn.Linear(*weight.shape, bias=False) for weight in weights]
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight.data = torch.tensor(weight.T.copy())
    network = torch.nn.Sequential(*(part for layer in layers for part in (layer, torch.nn.ReLU())))
    options = {"num_bins": 255, "criterion": criterion}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        theirs = torch_backend.quantize(network.eval(), [torch.tensor(x)], **options).thresholds
        ours = calibrate(
            lambda ws, x: functools.reduce(lambda x, w: jax.nn.relu(x @ w), ws, x), weights, [x], **options
        )
    assert list(map(repr, ours.thresholds.values())) == list(map(repr, theirs.values()))
