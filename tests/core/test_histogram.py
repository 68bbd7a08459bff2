from math import inf, nan

import numpy as np
import pytest

import klquant
from klquant import ArrayTypeError, Histogram, InvalidInputError, reference
from klquant._namespace import CHUNK
from klquant.histogram import symmetric_edges
from support.namespaces import JAX, JIT, NUMPY, enable_x64, needs_jax, params


@pytest.mark.parametrize(
    ("x", "num_bins", "amax", "expected"),
    [
        ([-3.0, 0.0, 0.5, 2.0], 3, 3.0, [1, 2, 1]),
        ([-1.0, 1.0], 3, 3.0, [1, 0, 1]),  # on an edge: the outer bin, on both sides
        ([-0.999, 0.999], 3, 3.0, [0, 2, 0]),
        ([-3.0, 3.0], 3, 3.0, [1, 0, 1]),  # the range is closed
        ([-7.0, 7.0, 1e30], 3, 3.0, [1, 0, 2]),  # saturates
        ([0.0, -0.0], 3, 3.0, [0, 2, 0]),
        ([0.5, 1.5, 2.5, 2.5], 5, 2.5, [0, 0, 0, 1, 3]),
        ([], 3, 1.0, [0, 0, 0]),
        ([[-3.0, 0.0], [0.5, 2.0]], 3, 3.0, [1, 2, 1]),
        (2.0, 3, 3.0, [0, 0, 1]),
    ],
)
def test_counts_by_hand(xp, x, num_bins, amax, expected):
    hist, edges = xp.call(klquant.histogram, xp.asarray(x, np.float64), num_bins=num_bins, amax=amax)
    assert xp.owns(hist, edges)
    assert hist.dtype == np.int64
    assert edges.dtype == np.float64
    np.testing.assert_array_equal(hist, expected)
    np.testing.assert_allclose(edges, np.linspace(-amax, amax, num_bins + 1), rtol=1e-15, atol=1e-15)


def test_the_range_is_that_of_the_data(eager):
    hist, edges = klquant.histogram(eager.asarray([-2.0, 1.0, 0.0], np.float32), num_bins=5)
    np.testing.assert_array_equal(edges, [-2, -1.2, -0.4, 0.4, 1.2, 2])
    np.testing.assert_array_equal(hist, [1, 0, 1, 1, 0])


def test_4001_bins_are_the_default(eager):
    assert klquant.histogram(eager.asarray([1.0], np.float32)).hist.shape == (4001,)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "uint8", "int32"])
def test_every_real_dtype_is_counted_alike(eager, dtype):
    hist = klquant.histogram(eager.asarray([0, 3, 100, 100], dtype), num_bins=5).hist
    np.testing.assert_array_equal(hist, [0, 0, 2, 0, 2])


@pytest.mark.parametrize("dtype", ["float64", "int64"])
@pytest.mark.parametrize(
    "xp",
    [
        *params(NUMPY),
        pytest.param(
            JAX,
            marks=needs_jax,
        ),
    ],
)
def test_64_bit_data_are_counted_alike(xp, dtype):
    hist = klquant.histogram(xp.asarray([0, 3, 100, 100], dtype), num_bins=5).hist
    np.testing.assert_array_equal(hist, [0, 0, 2, 0, 2])


@needs_jax
def test_bfloat16_values_are_counted_exactly():
    x = JAX.asarray(np.random.default_rng(5).normal(size=500), np.float32).astype("bfloat16")
    expected = reference.histogram(np.asarray(x, np.float64), 2.5, 255)
    np.testing.assert_array_equal(klquant.histogram(x, num_bins=255, amax=2.5).hist, expected)
    np.testing.assert_array_equal(klquant.histogram(np.asarray(x), num_bins=255, amax=2.5).hist, expected)


@pytest.mark.parametrize("amax", [None, 2.0])
def test_chunks_of_the_cache_lose_nothing_at_their_borders(amax):
    """The data fill two of NumPy's chunks and part of a third. Some values are beyond `amax` = 2."""
    x = np.random.default_rng(4).normal(size=2 * CHUNK + 77).astype(np.float32)
    hist, edges = klquant.histogram(x, num_bins=255, amax=amax)
    np.testing.assert_array_equal(hist, reference.histogram(x, edges[-1], 255))


@pytest.mark.parametrize("num_bins", [3, 5, 255, 4001])
@pytest.mark.parametrize("amax", [1.0, 0.1, 6.0625, 3e-5, 204800.0])
def test_values_next_to_an_edge_are_counted_as_in_the_reference(xp, num_bins, amax):
    edges = symmetric_edges(amax, num_bins)
    x = np.concatenate([edges, np.nextafter(edges, inf), np.nextafter(edges, -inf), -edges])
    hist = xp.call(klquant.histogram, xp.asarray(x), num_bins=num_bins, amax=amax).hist
    np.testing.assert_array_equal(hist, reference.histogram(x, amax, num_bins))


def test_many_values_are_counted_as_in_the_reference(xp):
    x = np.random.default_rng(3).standard_t(3, size=5000)
    hist = xp.call(klquant.histogram, xp.asarray(x), num_bins=2001, amax=6.5).hist
    np.testing.assert_array_equal(hist, reference.histogram(x, 6.5, 2001))


@pytest.mark.parametrize("num_bins", [3, 255, 2001, 12001])
@pytest.mark.parametrize("amax", [1.0, 0.1, 1e-30, 1e30])
def test_edges_are_exactly_antisymmetric_and_increase(num_bins, amax):
    edges = symmetric_edges(amax, num_bins)
    assert edges.shape == (num_bins + 1,)
    assert edges[-1] == amax
    np.testing.assert_array_equal(edges, -edges[::-1])
    assert (np.diff(edges) > 0).all()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([1.0, nan, 2.0], "`x` must be finite, got 1 NaN or infinite values out of 3"),
        ([inf, -inf], "`x` must be finite, got 2 NaN or infinite values out of 2"),
        ([0.0, 0.0], "`x` must have a value other than 0, got 2 zeros; or pass `amax`"),
        ([], "`x` must have a value other than 0, got 0 zeros; or pass `amax`"),
    ],
)
def test_data_without_a_range_are_refused(eager, x, message):
    with pytest.raises(InvalidInputError, match=message):
        klquant.histogram(eager.asarray(x, np.float32), num_bins=3)


@pytest.mark.parametrize("num_bins", [2, 4000, 1, 0, -3])
def test_even_and_tiny_numbers_of_bins_are_refused(xp, num_bins):
    with pytest.raises(InvalidInputError, match=f"`num_bins` must be odd and at least 3, got {num_bins}"):
        xp.call(klquant.histogram, xp.asarray([1.0]), num_bins=num_bins, amax=1.0)


@pytest.mark.parametrize("amax", [0.0, -1.0, nan, inf])
def test_bad_ranges_are_refused(xp, amax):
    with pytest.raises(InvalidInputError, match=f"`amax` must be positive and finite, got {amax}"):
        xp.call(klquant.histogram, xp.asarray([1.0]), num_bins=3, amax=amax)


def test_dtypes_that_are_not_real_are_refused():
    for x, kind in [([1.0], "got list"), (np.array([1j]), "got dtype complex128"), (np.array(["a"]), "got dtype <U1")]:
        with pytest.raises(ArrayTypeError, match=kind):
            klquant.histogram(x, num_bins=3)


@needs_jax
def test_a_tracer_needs_amax():
    with pytest.raises(ArrayTypeError, match="`amax` must be given when `x` is traced"):
        JIT.call(klquant.histogram, JIT.asarray([1.0]), num_bins=3)


@pytest.mark.parametrize("amax", [1e-310, 5e-324])
def test_a_range_too_small_for_the_bins_is_counted_or_refused_by_name(amax):
    try:
        hist = klquant.histogram(np.array([0.0, amax]), num_bins=3).hist
    except InvalidInputError:
        return
    assert hist.tolist() == [0, 1, 1]


def parts(xp, *chunks, amax=3.0):
    return [xp.call(klquant.histogram, xp.asarray(c, np.float64), num_bins=5, amax=amax) for c in chunks]


def test_merge_adds_counts_and_keeps_edges(xp):
    a, b = parts(xp, [-3.0, 0.1], [0.2, 3.0, 3.0])
    merged = xp.call(klquant.merge, a, b)
    assert isinstance(merged, Histogram)
    assert xp.owns(*merged)
    assert merged.hist.dtype == np.int64
    np.testing.assert_array_equal(merged.hist, [1, 0, 2, 0, 2])
    np.testing.assert_array_equal(merged.edges, a.edges)


def test_merge_makes_new_counts():
    a, empty = parts(NUMPY, [1.0], [])
    merged = klquant.merge(a, empty)
    merged.hist[0] += 7
    assert a.hist[0] == 0


def test_merge_refuses_other_edges(eager):
    (a,), (b,) = parts(eager, [1.0]), parts(eager, [1.0], amax=4.0)
    with pytest.raises(InvalidInputError, match=r"must have the same edges, got ranges up to 3.0 and 4.0"):
        klquant.merge(a, b)


def test_merge_refuses_other_numbers_of_bins(xp):
    (a,) = parts(xp, [1.0])
    b = xp.call(klquant.histogram, xp.asarray([1.0]), num_bins=7, amax=3.0)
    with pytest.raises(InvalidInputError, match="must have the same number of bins, got 5 and 7"):
        xp.call(klquant.merge, a, b)


def test_merge_refuses_to_overflow(eager):
    full = Histogram(eager.asarray([2**62, 0, 1]), eager.asarray([-3.0, -1.0, 1.0, 3.0]))
    with pytest.raises(InvalidInputError, match=r"must stay below 2\*\*63"):
        klquant.merge(full, full)


EDGES = np.array([-3.0, -1.0, 1.0, 3.0])


@pytest.mark.parametrize(
    ("hist", "edges", "error", "message"),
    [
        ([1.0, np.nan, 1.0], EDGES, InvalidInputError, r"`a.hist` must be finite, got nan at index 1"),
        ([1, -1, 1], EDGES, InvalidInputError, r"`a.hist` must not be negative, got -1 at index 1"),
        ([True, False, True], EDGES, ArrayTypeError, r"`a.hist` must hold real numbers, got dtype bool"),
        ([1, 2, 3], EDGES[:3], InvalidInputError, r"`a` must have one edge more than bins, got \(3,\) for \(3,\)"),
        ([1, 2, 3], EDGES.astype("M8[s]"), ArrayTypeError, r"`a.edges` must hold real numbers, got dtype datetime64"),
    ],
)
def test_merge_refuses_what_is_no_histogram(hist, edges, error, message):
    wrong = Histogram(np.array(hist), edges)
    with pytest.raises(error, match=message):
        klquant.merge(wrong, wrong)
    with pytest.raises(error, match=message.replace("`a", "`b")):
        klquant.merge(Histogram(np.ones(3, np.int64), EDGES), wrong)


def test_merge_refuses_lists():
    with pytest.raises(ArrayTypeError, match=r"`a.edges` must be a NumPy or JAX array, got list"):
        klquant.merge(Histogram(np.ones(3), [-3.0, -1.0, 1.0, 3.0]), Histogram(np.ones(3), EDGES))


@pytest.mark.parametrize("amax", [None, 2.0])
def test_an_axis_without_slices_is_refused(eager, amax):
    with pytest.raises(InvalidInputError, match=r"`x` must have a slice along axis 0, got shape \(0, 7\)"):
        klquant.histogram(eager.asarray(np.zeros((0, 7))), num_bins=3, axis=0, amax=amax)


@needs_jax
def test_merge_refuses_mixed_libraries():
    with pytest.raises(ArrayTypeError, match="`a` from numpy, `b` from jax"):
        klquant.merge(*parts(NUMPY, [1.0]), *parts(JAX, [1.0]))


def test_counting_goes_on_beyond_single_precision(xp):
    many = Histogram(xp.asarray([2**24, 2**40, 2**53]), xp.asarray([-3.0, -1.0, 1.0, 3.0]))
    one = xp.call(klquant.histogram, xp.asarray([-2.0, 0.0, 2.0]), num_bins=3, amax=3.0)
    np.testing.assert_array_equal(xp.call(klquant.merge, many, one).hist, [2**24 + 1, 2**40 + 1, 2**53 + 1])


@pytest.mark.parametrize(("dtype", "count"), [("int8", 100), ("uint8", 200), ("int32", 2**31 - 1), ("uint32", 2**31)])
def test_narrow_counts_are_merged_in_64_bits(xp, dtype, count):
    narrow = Histogram(xp.asarray([count] * 3, dtype), xp.asarray([-3.0, -1.0, 1.0, 3.0]))
    merged = xp.call(klquant.merge, narrow, narrow).hist
    assert merged.dtype == np.int64
    assert np.asarray(merged).tolist() == [2 * count] * 3


def test_merge_takes_histograms_only():
    a = klquant.histogram(np.ones(1), num_bins=3)
    with pytest.raises(ArrayTypeError, match="`b` must be a Histogram, got tuple"):
        klquant.merge(a, tuple(a))
    with pytest.raises(ArrayTypeError, match="`a` must be a Histogram, got ndarray"):
        klquant.merge(a.hist, a)


def slices_of(x, axis):
    return [np.take(x, k, axis) for k in range(x.shape[axis])]


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_an_axis_gives_a_histogram_for_each_slice(eager, axis):
    x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    found = klquant.histogram(eager.asarray(x), num_bins=7, axis=axis)
    alone = [klquant.histogram(part, num_bins=7) for part in slices_of(x, axis)]
    assert eager.owns(*found)
    np.testing.assert_array_equal(found.hist, [one.hist for one in alone])
    np.testing.assert_array_equal(found.edges, [one.edges for one in alone])


@pytest.mark.parametrize("amax", [1.5, [0.5, 1.0, 4.0]])
def test_slices_share_a_range_or_have_one_each(xp, amax):
    x = np.random.default_rng(0).normal(size=(3, 40))
    ranges = amax if isinstance(amax, float) else xp.asarray(amax)
    if xp.is_traced and not isinstance(amax, float):
        found = xp.call(lambda x, a: klquant.histogram(x, num_bins=7, axis=0, amax=a), xp.asarray(x), ranges)
    else:
        found = xp.call(klquant.histogram, xp.asarray(x), num_bins=7, axis=0, amax=ranges)
    for row, limit, hist, edges in zip(x, np.broadcast_to(amax, 3), *found, strict=True):
        np.testing.assert_array_equal(hist, reference.histogram(row, limit, 7))
        np.testing.assert_array_equal(edges, symmetric_edges(limit, 7))
    merged = xp.call(klquant.merge, found, found)
    np.testing.assert_array_equal(merged.hist, 2 * np.asarray(found.hist))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis": 2}, r"`axis` must be an axis of `x`, got 2 for shape \(2, 3\)"),
        ({"axis": 0, "amax": np.ones(3)}, r"`amax` must be a number, or of shape \(2,\), got shape \(3,\)"),
        ({"amax": np.ones(1)}, r"`amax` must be a number, got shape \(1,\)"),
        ({"axis": 0, "amax": np.array([1.0, 0.0])}, r"`amax` must be positive and finite, got 0.0"),
        ({"axis": 0}, r"`x` must have a value other than 0, got 3 zeros at \[1\] of the axis; or pass `amax`"),
    ],
)
def test_slices_without_a_range_are_refused(options, message):
    with pytest.raises(InvalidInputError, match=message):
        klquant.histogram(np.array([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]]), num_bins=3, **options)


@needs_jax
def test_vmap_counts_with_a_range_for_each_row():
    import jax

    x, amax = np.random.default_rng(0).normal(size=(3, 40)), np.array([0.5, 1.0, 4.0])
    with enable_x64():
        found = jax.vmap(lambda x, a: klquant.histogram(x, num_bins=7, amax=a))(JAX.asarray(x), JAX.asarray(amax))
    expected = klquant.histogram(x, num_bins=7, amax=amax, axis=0)
    np.testing.assert_array_equal(found.hist, expected.hist)
    np.testing.assert_array_equal(found.edges, expected.edges)
