import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import klquant
from klquant import Histogram, reference
from klquant._namespace import CHUNK
from klquant.histogram import symmetric_edges
from klquant.testing import activations, assert_counts, assert_monoid
from strategies import fewer
from support.namespaces import JAX, JIT, READ_ONLY, needs_jax, params

NUM_BINS = st.sampled_from([3, 15, 255, 2001])
AMAX = st.floats(1e-6, 1e6) | st.sampled_from([1.0, 1.5, 2.0])


@st.composite
def batches(draw):
    """Draw a few arrays, some of them empty, to count over one range."""
    parts = draw(st.lists(activations(dtype="float64", max_size=20), min_size=1, max_size=5))
    return parts, draw(NUM_BINS), draw(AMAX)


@st.composite
def histograms_to_merge(draw, how_many):
    num_bins, amax = draw(NUM_BINS), draw(AMAX)
    return [
        klquant.histogram(draw(activations(dtype="float64", max_size=20)), num_bins=num_bins, amax=amax)
        for _ in range(how_many)
    ]


def count(x, num_bins, amax):
    return klquant.histogram(x, num_bins=num_bins, amax=amax)


def same(a, b):
    return a.hist.tobytes() == b.hist.tobytes() and a.edges.tobytes() == b.edges.tobytes()


@given(activations(dtype="float64"), NUM_BINS, AMAX)
def test_counts_are_those_of_the_reference(x, num_bins, amax):
    assert_counts(*count(x, num_bins, amax), x)


@needs_jax
@fewer()
@given(activations(dtype="float32"), NUM_BINS, AMAX)
def test_bfloat16_values_are_counted_exactly(x, num_bins, amax):
    rounded = np.asarray(JAX.asarray(x).astype("bfloat16"))
    np.testing.assert_array_equal(
        count(rounded, num_bins, amax).hist, reference.histogram(rounded.astype(float), amax, num_bins)
    )


@given(NUM_BINS, AMAX, st.integers(-2, 2))
def test_values_on_and_next_to_every_edge_are_counted_as_in_the_reference(num_bins, amax, steps):
    x = symmetric_edges(amax, num_bins)
    for _ in range(abs(steps)):
        x = np.nextafter(x, np.inf * steps)
    np.testing.assert_array_equal(count(x, num_bins, amax).hist, reference.histogram(x, amax, num_bins))


@given(activations(dtype="float64"), NUM_BINS, AMAX)
def test_values_lie_between_the_edges_of_their_bins(x, num_bins, amax):
    hist, edges = count(x, num_bins, amax)
    inside = np.clip(x, -amax, amax)
    slack = 4 * np.finfo(float).eps * amax
    for k in np.flatnonzero(hist):
        near = (inside >= edges[k] - slack) & (inside <= edges[k + 1] + slack)
        assert near.sum() >= hist[k]


@given(NUM_BINS, AMAX)
def test_bins_are_odd_and_equal_and_the_range_symmetric(num_bins, amax):
    hist, edges = count(np.zeros(0), num_bins, amax)
    assert len(hist) % 2 == 1
    assert len(edges) == len(hist) + 1
    assert edges[-1] == amax
    np.testing.assert_array_equal(edges, -edges[::-1])
    np.testing.assert_allclose(np.diff(edges), 2 * amax / num_bins, rtol=1e-9)


@given(activations(dtype="float64"), NUM_BINS)
def test_the_range_is_the_largest_absolute_value(x, num_bins):
    assume(x.size and np.abs(x).max() > 1e-290)
    hist, edges = klquant.histogram(x, num_bins=num_bins)
    assert edges[-1] == np.abs(x).max()
    assert hist[-1] + hist[0] >= 1


@given(activations(dtype="float64"), NUM_BINS, AMAX)
def test_no_value_is_lost(x, num_bins, amax):
    assert count(x, num_bins, amax).hist.sum() == x.size


@given(activations(dtype="float64"), NUM_BINS, AMAX)
def test_mirrored_data_have_the_mirrored_histogram(x, num_bins, amax):
    np.testing.assert_array_equal(count(-x, num_bins, amax).hist, count(x, num_bins, amax).hist[::-1])


@given(activations(dtype="float64", limit=1e3), NUM_BINS, AMAX, st.integers(-60, 60))
def test_powers_of_two_scale_the_edges_and_leave_the_counts(x, num_bins, amax, exponent):
    factor = 2.0**exponent
    assume((np.abs(x[x != 0]) > 1e-250).all())
    plain, scaled = count(x, num_bins, amax), count(x * factor, num_bins, amax * factor)
    np.testing.assert_array_equal(scaled.hist, plain.hist)
    np.testing.assert_array_equal(scaled.edges, plain.edges * factor)


@given(batches(), st.randoms(use_true_random=False))
def test_the_split_into_batches_and_their_order_do_not_matter(drawn, random):
    parts, num_bins, amax = drawn
    whole = count(np.concatenate(parts), num_bins, amax)
    random.shuffle(parts)
    merged = count(np.zeros(0), num_bins, amax)
    for part in parts:
        merged = klquant.merge(merged, count(part, num_bins, amax))
    assert same(merged, whole)


@given(activations(dtype="float64"), NUM_BINS, AMAX, st.randoms(use_true_random=False))
def test_the_order_of_the_values_does_not_matter(x, num_bins, amax, random):
    order = list(range(x.size))
    random.shuffle(order)
    assert same(count(x[order], num_bins, amax), count(x, num_bins, amax))


@given(activations(dtype="float64"), NUM_BINS, AMAX)
def test_the_shape_of_the_data_does_not_matter(x, num_bins, amax):
    assert same(count(np.stack([x, x]), num_bins, amax), count(np.concatenate([x, x]), num_bins, amax))


@given(histograms_to_merge(3))
def test_merge_is_a_monoid(three):
    zero = klquant.histogram(np.zeros(0), num_bins=len(three[0].hist), amax=three[0].edges[-1])
    assert_monoid(klquant.merge, *three, zero=zero)


@given(histograms_to_merge(2), st.integers(0, 2**61))
def test_merge_adds_exactly(two, offset):
    a, b = two
    large = Histogram(a.hist + offset // len(a.hist), a.edges)
    merged = klquant.merge(large, b).hist
    assert merged.tolist() == [int(m) + int(n) for m, n in zip(large.hist, b.hist, strict=True)]


@pytest.mark.parametrize("xp", params(READ_ONLY, JAX, JIT))
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@fewer()
@given(data=st.data())
def test_every_library_counts_the_same_bit_for_bit(xp, dtype, data):
    x = np.resize(np.append(data.draw(activations(dtype=dtype)), dtype(0)), 16)  # one size: each costs a compilation
    num_bins, amax = 255, data.draw(st.sampled_from([0.1, 2.0]))
    before = x.tobytes()
    found = xp.call(klquant.histogram, xp.asarray(x), num_bins=num_bins, amax=amax)
    expected = count(x, num_bins, amax)
    np.testing.assert_array_equal(found.hist, expected.hist)
    np.testing.assert_array_equal(found.edges, expected.edges)
    merged = xp.call(klquant.merge, found, found)
    np.testing.assert_array_equal(merged.hist, 2 * expected.hist)
    assert x.tobytes() == before


@fewer()
@given(activations(dtype="float64", max_size=20), st.integers(-2, 2 * CHUNK + 2), NUM_BINS, AMAX)
def test_inputs_above_the_chunk_size_are_counted_completely(x, more, num_bins, amax):
    x = np.append(x, 0.25 * amax)
    repeats, rest = divmod(CHUNK + more, x.size)
    whole = count(np.resize(x, repeats * x.size + rest), num_bins, amax).hist
    np.testing.assert_array_equal(whole, repeats * count(x, num_bins, amax).hist + count(x[:rest], num_bins, amax).hist)


@given(st.data(), NUM_BINS)
def test_an_axis_counts_each_slice_alone(data, num_bins):
    shape = data.draw(npst.array_shapes(min_dims=1, max_dims=3, max_side=4))
    x = data.draw(npst.arrays(np.float64, shape, elements=st.floats(-10, 10)))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    ranges = data.draw(npst.arrays(np.float64, shape[axis], elements=st.floats(0.1, 20)))
    found = klquant.histogram(x, num_bins=num_bins, amax=ranges, axis=axis)
    for k, amax in enumerate(ranges.tolist()):
        alone = count(np.take(x, k, axis), num_bins, amax)
        assert same(klquant.Histogram(found.hist[k], found.edges[k]), alone)


@given(
    st.lists(activations(dtype="float64", max_size=19).map(lambda x: np.append(1.0, x)), min_size=1, max_size=4),
    NUM_BINS,
)
def test_slices_have_the_ranges_of_their_own_data(rows, num_bins):
    x = np.stack([np.resize(row, 20) for row in rows])
    found = klquant.histogram(x, num_bins=num_bins, axis=0)
    np.testing.assert_array_equal(found.edges[:, -1], np.abs(x).max(axis=1))
    np.testing.assert_array_equal(found.hist, [klquant.histogram(row, num_bins=num_bins).hist for row in x])


@given(histograms_to_merge(1), st.sampled_from(["i1", "u1", ">i2", "u4", "f4"]))
def test_narrow_counts_are_added_without_overflow(one, dtype):
    (a,) = one
    most = np.array(np.finfo(dtype).maxexp if dtype == "f4" else np.iinfo(dtype).max).astype(dtype)
    narrow = Histogram(np.full(len(a.hist), most), a.edges)
    assert klquant.merge(narrow, narrow).hist.tolist() == [2 * int(most)] * len(a.hist)
