"""The device counts what klquant counts on the host, bit for bit, also on edges and beyond the range."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klquant.backends.collection import Bins, count
from klquant.backends.jax.observation.counting import Table, counted, nothing, see, table_of
from klquant.errors import InvalidInputError

see = jax.jit(see)
CASES = {
    "two passes": Bins(4001, 3.7),
    "capped": Bins(255, 0.311),
    "many bins": Bins(65537, 4.1),
    "one pass": Bins(12003, 3.0, 1),
    "small level": Bins(765, 3.0**-9, -9),
    "large": Bins(4001, 3.3e38),
    "small": Bins(4001, 1e-31),
}


def values(bins, seed=0):
    """Return values of all sizes, many of them on an edge or beside it."""
    rng = np.random.default_rng(seed)
    edges = (2 * rng.integers(0, bins.num_bins // 2, 1000) + 1) / bins.num_bins * bins.amax
    on = edges.astype(np.float32)
    end = np.float32(bins.amax)
    last = [end, end, np.nextafter(end, np.float32(0)), np.nextafter(end, np.float32(np.inf)), 0, 0]
    parts = [on, np.nextafter(on, np.float32(0)), -on, rng.standard_normal(4096) / 4 * end, last]
    return np.concatenate(parts).astype(np.float32)


@pytest.mark.parametrize("case", CASES)
def test_counts_are_those_of_numpy(case):
    bins = CASES[case]
    x = values(bins)
    table = table_of(bins, np.float32)
    seen = see(x.reshape(-1, 2), table, nothing(table, np.float32))
    expected, found = count(x, bins), counted(seen, bins)
    np.testing.assert_array_equal(found.counts, expected.counts)
    assert found.zeros == expected.zeros
    assert (seen.low, seen.high) == (x.min(), x.max())
    outer = Bins(3, 3 * math.nextafter(bins.amax, math.inf))
    ends = count(x, outer).counts
    assert counted(seen, outer).counts[0] == ends[0] + ends[2]


def test_narrow_types_count_as_float32():
    bins, x = CASES["two passes"], jnp.asarray(values(CASES["two passes"]), jnp.bfloat16)
    table = table_of(bins, jnp.bfloat16)
    found = counted(see(x, table, nothing(table, x.dtype)), bins)
    np.testing.assert_array_equal(found.counts, count(np.asarray(x.astype(np.float32)), bins).counts)


def test_calls_add_up():
    bins, (a, b) = CASES["two passes"], values(CASES["two passes"]).reshape(2, -1)
    table = table_of(bins, np.float32)
    both = see(b, table, see(a, table, nothing(table, np.float32)))
    np.testing.assert_array_equal(both.counts, count(values(bins), bins).counts)
    assert both.calls == 2


def test_nan_and_nothing_are_seen():
    assert np.isnan(see(np.array([1, np.nan, 2], np.float32), None, nothing(None, np.float32)).high)
    empty = see(np.zeros((0, 3), np.float32), None, nothing(None, np.float32))
    assert (empty.low, empty.high, empty.calls) == (np.inf, -np.inf, 1)


def test_too_many_values_are_an_error():
    bins = Bins(3, 1.0)
    table: Table = table_of(bins, np.float32)
    seen = nothing(table, np.float32)._replace(counts=np.array([0, 2**31 - 1, 0], np.int32))
    with pytest.raises(InvalidInputError, match=r"fewer than 2\*\*31"):
        counted(see(np.zeros(1, np.float32), table, seen), bins)
