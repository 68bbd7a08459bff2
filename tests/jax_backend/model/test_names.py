"""The names of products are those that a user of each library knows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klquant.backends.jax.model.tracing import program_of

IMAGE, ROW = np.ones((2, 8, 8, 1), np.float32), np.ones((5, 3), np.float32)


def test_flax_nnx():
    nnx = pytest.importorskip("flax.nnx")

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)])

        def __call__(self, x):
            x = nnx.relu(self.norm(self.conv(x))).mean((1, 2))
            return self.layers[1](self.layers[0](x))

    network = Network(nnx.Rngs(0))
    network.eval()
    graph, state = nnx.split(network)
    expected = ["conv", "layers.0", "layers.1"]
    assert program_of(lambda network, x: network(x), network, (IMAGE,)).tensors == expected
    assert program_of(lambda state, x: nnx.merge(graph, state)(x), state, (IMAGE,)).tensors == expected


def test_products_of_activations_in_flax_nnx():
    nnx = pytest.importorskip("flax.nnx")

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs) for _ in range(2)])

        def __call__(self, x, mask):
            for block in self.blocks:
                x = x + block(x, mask=mask)
            return x @ x.T

    inputs = np.ones((5, 4), np.float32), np.ones((2, 5, 5), bool)
    found = program_of(lambda network, x, mask: network(x, mask), Network(nnx.Rngs(0)), inputs).named
    names = [name for name, site in found.items() if site.weight is None]
    assert names == ["blocks.0", "blocks.0:1", "blocks.1", "blocks.1:1", "blocks"]


def test_products_of_activations_in_equinox():
    equinox = pytest.importorskip("equinox")
    attention = [equinox.nn.MultiheadAttention(2, 4, key=jax.random.key(k)) for k in range(2)]

    def function(modules, x):
        for module in modules["layers"]:
            x = module(x, x, x)
        return x

    found = program_of(function, {"layers": attention}, (np.ones((5, 4), np.float32),)).named
    names = [name for name, site in found.items() if site.weight is None]
    assert names == ["layers.0", "layers.0:1", "layers.1", "layers.1:1"]


def test_flax_linen():
    linen = pytest.importorskip("flax.linen")

    class Network(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.relu(linen.Conv(4, (3, 3), name="stem")(x))
            x = linen.MultiHeadDotProductAttention(2)(x.reshape(2, -1, 4))
            return linen.Dense(3)(x)

    network = Network()
    params = network.init(jax.random.key(0), IMAGE)
    attention = "MultiHeadDotProductAttention_0"
    assert program_of(network.apply, params, (IMAGE,)).tensors == [
        "stem",
        *(f"{attention}.{name}" for name in ("query", "key", "value")),
        f"Network/{attention}.lhs",
        f"Network/{attention}.rhs",
        f"Network/{attention}:1.lhs",
        f"Network/{attention}:1.rhs",
        f"{attention}.out",
        "Dense_0",
    ]


def test_equinox():
    equinox = pytest.importorskip("equinox")
    network = equinox.nn.MLP(3, 2, 4, 2, key=jax.random.key(0))
    found = program_of(lambda network, x: jax.vmap(network)(x), network, (ROW,))
    assert found.tensors == ["layers.0", "layers.1", "layers.2"]


def test_plain_functions():
    def function(params, x):
        with jax.named_scope("stem"):
            x = jnp.tanh(x @ params[0]["w"])
        x = (x @ params[1]["w"]) @ params[1]["w"]
        return x @ np.ones((3, 2), np.float32)

    params = [{"w": np.ones((3, 3), np.float32)}, {"w": np.ones((3, 3), np.float32)}]
    assert program_of(function, params, (ROW,)).tensors == ["stem", "1", "1:1", "dot_general"]


def test_names_do_not_depend_on_the_batch_size():
    def function(params, x):
        return jax.nn.softmax((x @ params["w"]) @ x.T)

    found = [program_of(function, {"w": np.ones((3, 3))}, (np.ones((size, 3)),)).tensors for size in (1, 2, 7)]
    assert found == [["w", "dot_general.lhs", "dot_general.rhs"]] * 3
