import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from namespaces import EAGER, JAX, JIT, READ_ONLY, params
from strategies import fewer

from klquant._namespace import array_namespace, bincount, compiled, from_numpy, map_blocks

DTYPES = st.sampled_from(["int8", "uint8", "int32", "int64", "uint64", "float16", "float32", "float64"])


@compiled
def count(index, *, xp):
    return bincount(index, 9, xp=xp)


@compiled
def doubled_where_needed(blocks, needed, *, xp):
    return map_blocks(lambda block: block * 2.0, blocks, needed, xp=xp)


@pytest.mark.parametrize("xp", EAGER)
@given(npst.arrays(DTYPES, 5))
def test_moving_an_array_keeps_its_bits(xp, array):
    moved = from_numpy(array, xp=array_namespace(x=xp.asarray(0)))
    assert np.asarray(moved).tobytes() == array.tobytes()
    assert moved.dtype == array.dtype


@pytest.mark.parametrize("xp", params(READ_ONLY, JAX, JIT))
@fewer()
@given(npst.arrays(np.int64, 12, elements=st.integers(0, 8)))
def test_every_index_is_counted_once(xp, index):
    counts = np.asarray(xp.call(count, xp.asarray(index)))
    assert counts.tolist() == [index.tolist().count(k) for k in range(9)]


@pytest.mark.parametrize("xp", params(READ_ONLY, JAX, JIT))
@fewer()
@given(npst.arrays(np.int64, (4, 3), elements=st.integers(-9, 9)), npst.arrays(bool, 4))
def test_only_needed_blocks_are_computed(xp, blocks, needed):
    result = xp.call(doubled_where_needed, xp.asarray(blocks), xp.asarray(needed))
    np.testing.assert_array_equal(result, 2 * blocks * needed[:, None])
