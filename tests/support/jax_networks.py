"""JAX functions to quantize: the digits VGG with its trained weights, and one with every kind of body."""

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from support.namespaces import import_torch

CONVOLUTIONS = (0, 3, 7, 10)  # their numbers in the features of the demo network
POOLED = (3, 10)  # those before a max pooling


def demo_digits():
    """Return the module with the trained network and its images, or skip the test if there is no torch."""
    import_torch()
    from klquant.demo import digits

    return digits


@functools.cache
def vgg_params():
    """Return the weights of the demo network, in JAX's layouts."""
    state = {name: tensor.numpy() for name, tensor in demo_digits().load_network().state_dict().items()}
    params = {}
    for k in CONVOLUTIONS:
        norm = {name: state[f"features.{k + 1}.{name}"] for name in ("weight", "bias", "running_mean", "running_var")}
        kernel = state[f"features.{k}.weight"].transpose(2, 3, 1, 0)
        params[f"conv{k}"] = {"kernel": kernel, "bias": state[f"features.{k}.bias"], "norm": norm}
    first = state["classifier.1.weight"].reshape(128, 64, 2, 2).transpose(2, 3, 1, 0).reshape(256, 128)
    params["fc1"] = {"kernel": first, "bias": state["classifier.1.bias"]}
    params["fc2"] = {"kernel": state["classifier.3.weight"].T, "bias": state["classifier.3.bias"]}
    return jax.tree.map(jnp.asarray, params)


def vgg(params, x):
    for k in CONVOLUTIONS:
        layer = params[f"conv{k}"]
        norm = layer["norm"]
        x = lax.conv_general_dilated(x, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = (x + layer["bias"] - norm["running_mean"]) * lax.rsqrt(norm["running_var"] + 1e-5)
        x = jax.nn.relu(x * norm["weight"] + norm["bias"])
        if k in POOLED:
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = x.reshape(x.shape[0], -1)
    x = jax.nn.relu(x @ params["fc1"]["kernel"] + params["fc1"]["bias"])
    return x @ params["fc2"]["kernel"] + params["fc2"]["bias"]


@functools.cache
def digits():
    """Return 512 images for calibration, 600 to test, and their labels."""
    found = demo_digits().load_images()
    train, test = (x.permute(0, 2, 3, 1).numpy().copy() for x in (found.train_images[:512], found.test_images))
    return train, test, found.test_labels.numpy()


def loops(params, x):
    """Return something of x by products in a call, a scan, a branch, a loop, and of two activations."""
    with jax.named_scope("encoder"):
        x = jax.jit(lambda w, x: jax.nn.relu(x @ w))(params["first"], x)

        def step(carry, w):
            with jax.named_scope("block"):
                return jnp.tanh(carry @ w), carry.sum()

        x, sums = lax.scan(jax.checkpoint(step), x, params["blocks"])
        x = lax.cond(sums[0] > 1e9, lambda x: x @ params["never"], lambda x: x + params["bias"], x)
        x = lax.while_loop(lambda c: c[1] < 3, lambda c: (c[0] @ params["last"], c[1] + 1), (x, 0))[0]
    return {"out": x, "products": jnp.einsum("bi,ci->bc", x, x)}


def loops_params(seed=0, size=16):
    rng = np.random.default_rng(seed)
    shapes = dict.fromkeys(("first", "never", "last"), (size, size)) | {"blocks": (4, size, size)}
    weights = {name: (rng.standard_normal(shape) * 0.3).astype(np.float32) for name, shape in shapes.items()}
    return {**weights, "bias": rng.standard_normal(size).astype(np.float32)}


def random_batches(*sizes, width=16, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((size, width)).astype(np.float32) for size in sizes]


def sqnr_db(exact, other):
    exact, other = (np.asarray(x, np.float64) for x in (exact, other))
    return 10 * np.log10((exact**2).sum() / ((exact - other) ** 2).sum())


def s8_products(function, *args):
    """Return how many products of INT8 operands with INT32 sums a function asks XLA for, by kind."""
    text = jax.jit(function).lower(*args).as_text()
    kinds = re.findall(
        r"stablehlo\.(dot_general|convolution)\b.*\(tensor<[\dx]+xi8>, tensor<[\dx]+xi8>\) -> tensor<[\dx]+xi32>", text
    )
    return dict(Counter(kinds))


def compiled_s8_products(function, *args):
    """Return how many of them are left in the program that XLA has compiled, by kind."""
    found = Counter()
    for computation in jax.jit(function).lower(*args).compile().as_text().split("\n\n"):
        types = dict(re.findall(r"(%[\w.-]+) = (\w+)\[", computation))
        for kind, inputs in re.findall(r"= s32\S* (dot|convolution)\(([^)]*)\)", computation):
            found[kind] += all(types[name.strip()] == "s8" for name in inputs.split(","))
    return dict(+found)
