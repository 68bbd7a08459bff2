"""Searches histograms that are spread over four devices, and compares the thresholds with those of NumPy."""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import klquant

LEVELS = 15
HISTS, EDGES = np.random.default_rng(0).integers(0, 9, (8, 101)), np.linspace(-1, 1, 102)
HISTS[3, 52:] = 0
MESH = Mesh(np.array(jax.devices()), "i")
EXPLICIT = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Explicit,))
SEARCHES = {
    "entropy": functools.partial(klquant.optimal_threshold, num_quantized_bins=LEVELS),
    "one-sided": functools.partial(klquant.optimal_threshold, num_quantized_bins=LEVELS, one_sided=True),
    "percentile": functools.partial(klquant.percentile_threshold, num_quantized_bins=LEVELS),
    "mse": functools.partial(klquant.mse_threshold, num_quantized_bins=LEVELS),
}


def main():
    jax.config.update("jax_enable_x64", True)
    sharding = NamedSharding(MESH, P("i"))
    hists, edges = jax.device_put(HISTS, sharding), jnp.asarray(EDGES)
    for name, search in SEARCHES.items():
        expected = search(HISTS, EDGES).value
        mapped = jax.jit(jax.shard_map(search, mesh=MESH, in_specs=(P("i"), P()), out_specs=P("i")))(hists, edges)
        np.testing.assert_array_equal(mapped.value, expected)
        assert mapped.value.sharding.is_equivalent_to(sharding, 1)
        print(name, "shard_map")  # noqa: T201
        found = search(hists, edges)
        np.testing.assert_array_equal(found.value, expected)
        assert found.value.sharding.is_equivalent_to(sharding, 1)
        print(name, "sharded batch")  # noqa: T201
    explicit = NamedSharding(EXPLICIT, P("i"))
    search = SEARCHES["percentile"]  # the quickest to compile
    traced = jax.jit(search)(jax.device_put(HISTS, explicit), edges)
    np.testing.assert_array_equal(traced.value, search(HISTS, EDGES).value)
    assert traced.value.sharding.is_equivalent_to(explicit, 1)
    print("explicit mesh")  # noqa: T201
    for name, transform in {"vmap": jax.vmap, "jit(vmap)": lambda f: jax.jit(jax.vmap(f))}.items():
        mapped = transform(lambda hist: search(hist, edges))(jax.device_put(HISTS, explicit))
        np.testing.assert_array_equal(mapped.value, search(HISTS, EDGES).value)
        assert mapped.value.sharding.is_equivalent_to(explicit, 1)
        print("explicit mesh,", name)  # noqa: T201
    x = np.sin(HISTS)
    for axis in (0, None):
        found = klquant.histogram(jax.device_put(x, explicit), num_bins=5, axis=axis)
        np.testing.assert_array_equal(found.hist, klquant.histogram(x, num_bins=5, axis=axis).hist)
        print("explicit mesh, histogram", axis)  # noqa: T201
    merge = functools.partial(klquant.quantized_distribution, num_quantized_bins=LEVELS)
    merged = jax.vmap(merge)(*[jax.device_put(HISTS, explicit)] * 2)
    np.testing.assert_array_equal(merged, [merge(hist, hist) for hist in HISTS])
    print("explicit mesh, merging")  # noqa: T201


if __name__ == "__main__":
    main()
