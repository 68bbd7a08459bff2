import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from klquant._namespace import array_namespace, compiled, count_truncated, from_numpy, map_selected
from strategies import fewer
from support.namespaces import EAGER, JAX, JIT, READ_ONLY, params

DTYPES = st.sampled_from(["int8", "uint8", "int32", "int64", "uint64", "float16", "float32", "float64"])


@compiled
def count(numbers, *, xp):
    return count_truncated(numbers, 1, 4, clip=True, xp=xp)


@compiled
def doubled_where_selected(values, selected, *, xp):
    return map_selected(lambda indices: values[indices] * 2.0, selected, 3, xp=xp) * selected


@pytest.mark.parametrize("xp", EAGER)
@given(npst.arrays(DTYPES, 5))
def test_moving_an_array_keeps_its_bits(xp, array):
    moved = from_numpy(array, xp=array_namespace(x=xp.asarray(0)))
    assert np.asarray(moved).tobytes() == array.tobytes()
    assert moved.dtype == array.dtype


@pytest.mark.parametrize("xp", params(READ_ONLY, JAX, JIT))
@fewer()
@given(npst.arrays(np.int64, 12, elements=st.integers(-9, 9)))
def test_every_number_is_counted_once(xp, numbers):
    counts = np.asarray(xp.call(count, xp.asarray(numbers)))
    assert counts.tolist() == [np.clip(numbers, -4, 4).tolist().count(k) for k in range(-4, 5)]


@pytest.mark.parametrize("xp", params(READ_ONLY, JAX, JIT))
@fewer()
@given(npst.arrays(np.int64, 7, elements=st.integers(-9, 9)), npst.arrays(bool, 7))
def test_only_selected_values_are_computed(xp, values, selected):
    result = xp.call(doubled_where_selected, xp.asarray(values), xp.asarray(selected))
    np.testing.assert_array_equal(result, 2 * values * selected)
