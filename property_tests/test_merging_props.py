import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import klquant
from klquant import reference
from klquant._search.prefix_sums import counts_between, sum_up
from klquant.testing import COUNT_SHAPES, assert_merge_partition, assert_merged, counts, histograms
from strategies import JAX_SIZES, SIZES, fewer, vectors
from support.namespaces import JAX, JIT, READ_ONLY, params

LEVELS = st.integers(1, 20).map(lambda k: 2 * k + 1)


@st.composite
def partitions(draw):
    levels = draw(LEVELS | st.just(255), label="levels")
    return draw(st.integers(levels, 6 * levels + 1), label="bins"), levels


@st.composite
def values_with_support(draw):
    """Draw values, and a support that may or may not cover them."""
    num_bins, levels = draw(st.sampled_from(SIZES))
    values, support = (
        draw(counts(num_bins, shape=draw(st.sampled_from([*COUNT_SHAPES, "weights"])))) for _ in range(2)
    )
    return values, support if draw(st.booleans()) else values, levels


def merged_by(name, values, support, levels):
    if name == "reference":
        return reference.quantized_distribution(values, support, levels)
    return klquant.quantized_distribution(values, support, num_quantized_bins=levels)


@given(partitions())
def test_every_bin_is_in_exactly_one_group_and_groups_are_equal(partition):
    num_bins, levels = partition
    assert_merge_partition(
        klquant.merge_partition(num_bins, num_quantized_bins=levels), num_bins, num_quantized_bins=levels
    )


@pytest.mark.parametrize("implementation", ["fast", "reference"])
@given(values_with_support())
def test_each_group_is_flat_on_its_support_and_keeps_its_mass(implementation, drawn):
    values, support, levels = drawn
    merged = merged_by(implementation, values, support, levels)
    assert_merged(merged, values, support, num_quantized_bins=levels)


@given(values_with_support())
def test_merging_is_that_of_the_reference(drawn):
    values, support, levels = drawn
    merged = klquant.quantized_distribution(values, support, num_quantized_bins=levels)
    np.testing.assert_allclose(
        merged, reference.quantized_distribution(values, support, levels), rtol=1e-12, atol=1e-12
    )


@given(values_with_support())
def test_merging_twice_changes_nothing_more(drawn):
    values, support, levels = drawn
    once = klquant.quantized_distribution(values, support, num_quantized_bins=levels)
    twice = klquant.quantized_distribution(once, support, num_quantized_bins=levels)
    np.testing.assert_allclose(twice, once, rtol=1e-12, atol=1e-12)


@given(st.lists(st.integers(0, 2**55), min_size=1, max_size=60), st.data())
def test_sums_of_counts_are_exact(values, data):
    low = data.draw(st.integers(0, len(values)))
    high = data.draw(st.integers(low, len(values)))
    total = counts_between(sum_up(np.array(values), 0, xp=np), low, high, xp=np)
    assert total == float(sum(values[low:high]))


@given(vectors(), st.data())
def test_sums_of_weights_are_accurate_however_large_the_rest(values, data):
    low = data.draw(st.integers(0, len(values)))
    high = data.draw(st.integers(low, len(values)))
    total = counts_between(sum_up(values, 0, xp=np), low, high, xp=np)
    assert total == pytest.approx(math.fsum(values[low:high].tolist()), rel=1e-14, abs=1e-30)


@pytest.mark.parametrize("xp", params(READ_ONLY, JAX, JIT))
@fewer()
@given(histograms(sizes=JAX_SIZES, shapes=["dense", "weights"]))
def test_every_library_merges_alike(xp, case):
    before = case.hist.tobytes()
    hist = xp.asarray(case.hist)
    merged = xp.call(klquant.quantized_distribution, hist, hist, num_quantized_bins=case.num_quantized_bins)
    expected = klquant.quantized_distribution(case.hist, case.hist, num_quantized_bins=case.num_quantized_bins)
    np.testing.assert_allclose(merged, expected, rtol=1e-12)
    assert case.hist.tobytes() == before
