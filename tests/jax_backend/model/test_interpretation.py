"""A jaxpr that is interpreted without a rule computes the same, bit for bit, and all its products are found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from klquant.backends.jax.model.arguments import split
from klquant.backends.jax.model.interpretation import without_rule
from klquant.backends.jax.model.tracing import program_of
from klquant.backends.jax.model.weights import evaluate_weights
from support.jax_networks import digits, loops, loops_params, random_batches, vgg, vgg_params


def square(x):
    return x @ x


custom = jax.custom_vjp(square)
custom.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x,))
smooth = jax.custom_jvp(square)
smooth.defjvp(lambda primals, tangents: (primals[0] @ primals[0], tangents[0]))


def nested(params, x):
    """Scan over time inside of a scan over layers: one weight varies with the outer loop, one with both."""

    def layer(x, weights):
        outer, inner = weights
        return lax.scan(lambda x, w: (jnp.tanh(x @ outer + x @ w), None), x, inner)[0], None

    return lax.scan(layer, x, (params["outer"], params["inner"]))[0]


def reversed_scan(params, x):
    return lax.scan(lambda c, w: (c @ w, c[0]), x, params["blocks"], reverse=True, unroll=2)


def branches(params, x):
    choice = (x.sum() > 0).astype(jnp.int32) + 1
    return lax.switch(choice, [lambda x: x @ params["first"], lambda x: x, lambda x: custom(x) @ params["last"]], x)


RANDOM = np.random.default_rng(3)
DEEP = {
    "outer": RANDOM.standard_normal((3, 16, 16)).astype(np.float32) / 8,
    "inner": RANDOM.standard_normal((3, 2, 16, 16)).astype(np.float32) / 8,
}
X = RANDOM.standard_normal((16, 16)).astype(np.float32)
CASES = {
    "loops": (loops, loops_params(), X),
    "nested scans": (nested, DEEP, X),
    "reversed scan": (reversed_scan, loops_params(), X),
    "branches": (branches, loops_params(), X),
    "custom gradients": (lambda params, x: custom(smooth(x)) @ params["first"], loops_params(), X),
    "map": (lambda params, x: lax.map(lambda row: row @ params["first"], x), loops_params(), X),
    "vmap": (lambda params, x: jax.vmap(lambda row: params["first"] @ row)(x), loops_params(), X),
    "remat": (jax.checkpoint(lambda params, x: jnp.sin(x @ params["first"])), loops_params(), X),
    "gradient": (jax.grad(lambda params, x: (jnp.tanh(x @ params["first"]) ** 2).sum()), loops_params(), X),
    "bfloat16": (lambda params, x: x.astype("bfloat16") @ params["first"].astype("bfloat16"), loops_params(), X),
    "random numbers": (
        lambda params, x: x @ params["first"] + jax.random.normal(jax.random.key(0), x.shape),
        loops_params(),
        X,
    ),
    "python numbers": (lambda params, x: x @ params["first"] * params["factor"], {**loops_params(), "factor": 2}, X),
}


def run_both(function, params, *inputs):
    program = program_of(function, params, inputs)
    own, given = split(params), split(inputs)
    arrays = [*own.arrays, *given.arrays]
    found = jax.jit(lambda *arrays: without_rule(program.jaxpr, program.sites, arrays))(*arrays)

    def plain(*arrays):
        cut = len(own.arrays)
        return function(own.static.filled(arrays[:cut]), *given.static.filled(arrays[cut:]))

    return program, jax.tree.leaves(jax.jit(plain)(*arrays)), found


@pytest.mark.parametrize("case", CASES)
def test_interpretation_changes_no_bit(case):
    function, params, x = CASES[case]
    program, expected, found = run_both(function, params, x)
    assert program.sites
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_the_vgg_is_interpreted_exactly():
    program, [expected], [found] = run_both(vgg, vgg_params(), digits()[1][:8])
    assert list(program.named) == ["conv0", "conv3", "conv7", "conv10", "fc1", "fc2"]
    np.testing.assert_array_equal(found, expected)


def test_a_product_in_a_loop_is_one_site():
    program = program_of(loops, loops_params(), tuple(random_batches(5)))
    assert program.tensors == ["first", "encoder/block", "never", "last", "dot_general.lhs", "dot_general.rhs"]


def test_weights_are_what_follows_from_the_parameters():
    params = {"w": np.eye(16, dtype=np.float32), "factor": np.float32(3)}

    def function(params, x):
        folded = jax.jit(lambda w: (w * params["factor"]).T)(params["w"])
        merged = params["w"] @ params["w"]  # of parameters alone: no site
        return (x @ folded) @ (merged + x.sum())

    program = program_of(function, params, (X,))
    assert [site.weight for site in program.sites.values()] == [1, None]
    [weight] = evaluate_weights(program.jaxpr, split(params).arrays, dict(program.sites)).values()
    np.testing.assert_array_equal(weight, 3 * np.eye(16))


def test_weights_of_scans_are_stacked():
    program = program_of(nested, DEEP, (X,))
    weights = evaluate_weights(program.jaxpr, split(DEEP).arrays, dict(program.sites))
    found = {site.name: weights[path] for path, site in program.sites.items()}
    assert list(found) == ["outer", "inner"]
    for name, weight in found.items():
        np.testing.assert_array_equal(weight, DEEP[name])


def test_integer_products_are_left_alone():
    program = program_of(lambda params, x: x.astype("int32") @ params["w"], {"w": np.eye(16, dtype=np.int32)}, (X,))
    assert not program.sites
    assert not program.opaque


def test_what_is_hidden_is_named():
    def function(params, x):
        return lax.while_loop(lambda x: (x @ params["first"]).sum() < 0, lambda x: x @ params["last"], x)

    program = program_of(function, loops_params(), (X,))
    assert list(program.named) == ["last"]
    assert program.opaque == {"dot_general": "it lies in the condition of a loop"}


def test_products_by_groups_of_rows_are_named():
    def function(params, x):
        return lax.ragged_dot(x @ params["first"], params["blocks"], np.int32([4, 4, 4, 4]))

    program = program_of(function, loops_params(), (X,))
    assert list(program.named) == ["first"]
    assert program.opaque == {"blocks": "`ragged_dot_general` is not computed in INT8"}
