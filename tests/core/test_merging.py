import numpy as np
import pytest

import klquant
from klquant import ArrayTypeError, InvalidInputError
from support.namespaces import JAX, needs_jax


@pytest.mark.parametrize(
    ("num_bins", "levels", "expected"),
    [
        (3, 3, [0, 1, 2, 3]),
        (7, 3, [0, 2, 4, 7]),
        (8, 3, [0, 2, 4, 8]),
        (9, 3, [0, 3, 6, 9]),
        (11, 5, [0, 2, 4, 6, 8, 11]),
        (9, 5, [0, 1, 2, 3, 4, 9]),
    ],
)
def test_the_last_group_takes_the_remainder(num_bins, levels, expected):
    bounds = klquant.merge_partition(num_bins, num_quantized_bins=levels)
    assert bounds.dtype == np.int64
    assert bounds.tolist() == expected


def test_int8_has_255_levels():
    bounds = klquant.merge_partition(2001)
    assert len(bounds) == 256
    assert bounds[-2:].tolist() == [254 * 7, 2001]


@pytest.mark.parametrize(
    ("num_bins", "levels", "error", "message"),
    [
        (8, 4, InvalidInputError, "`num_quantized_bins` must be odd and at least 3, got 4"),
        (8, 1, InvalidInputError, "`num_quantized_bins` must be odd and at least 3, got 1"),
        (8, 3.0, ArrayTypeError, "`num_quantized_bins` must be an int, got float"),
        (2, 3, InvalidInputError, "`num_bins` must be at least num_quantized_bins = 3, got 2"),
        (10**400, 3, InvalidInputError, r"`num_bins` must be below 2\*\*63, got 1000"),
        (8.0, 3, ArrayTypeError, "`num_bins` must be an int, got float"),
        (True, 3, ArrayTypeError, "`num_bins` must be an int, got bool"),
    ],
)
def test_bad_partitions_are_refused(num_bins, levels, error, message):
    with pytest.raises(error, match=message):
        klquant.merge_partition(num_bins, num_quantized_bins=levels)


@pytest.mark.parametrize(
    ("values", "support", "expected"),
    [
        ([2, 4, 0, 3, 5, 5, 1], [2, 4, 0, 3, 5, 5, 1], [3, 3, 0, 3, 11 / 3, 11 / 3, 11 / 3]),
        ([0, 4, 1, 3, 6, 0, 0], [9, 4, 1, 3, 6, 0, 8], [2, 2, 2, 2, 3, 0, 3]),
        ([1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0, 0], [0, 0, 2, 0, 0, 0, 0]),
        ([0.5, 0.25, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1], [0.375, 0.375, 0, 0, 0, 0, 0]),
    ],
)
def test_each_group_spreads_its_total_over_its_support(xp, values, support, expected):
    merged = xp.call(klquant.quantized_distribution, xp.asarray(values), xp.asarray(support), num_quantized_bins=3)
    assert xp.owns(merged)
    assert merged.dtype == np.float64
    np.testing.assert_allclose(merged, expected, rtol=1e-15)


def test_a_level_per_bin_changes_nothing(xp):
    values = [3, 1, 4, 1, 5]
    merged = xp.call(klquant.quantized_distribution, xp.asarray(values), xp.asarray(values), num_quantized_bins=5)
    np.testing.assert_array_equal(merged, values)


def test_bad_distributions_are_refused(eager):
    seven, six = eager.asarray(np.ones(7)), eager.asarray(np.ones(6))
    with pytest.raises(InvalidInputError, match=r"must have the same shape, got \(7,\) and \(6,\)"):
        klquant.quantized_distribution(seven, six, num_quantized_bins=3)
    with pytest.raises(InvalidInputError, match=r"`num_bins` must be at least num_quantized_bins = 9, got 7"):
        klquant.quantized_distribution(seven, seven, num_quantized_bins=9)
    with pytest.raises(InvalidInputError, match=r"`num_quantized_bins` must be odd and at least 3, got 4"):
        klquant.quantized_distribution(seven, seven, num_quantized_bins=4)
    with pytest.raises(InvalidInputError, match=r"`values` must not be negative, got -1.0 at index 0"):
        klquant.quantized_distribution(eager.asarray(-np.ones(7)), seven, num_quantized_bins=3)
    with pytest.raises(InvalidInputError, match=r"`support` must be finite, got nan at index 0"):
        klquant.quantized_distribution(seven, eager.asarray(np.full(7, np.nan)), num_quantized_bins=3)


@needs_jax
def test_mixed_libraries_are_refused():
    with pytest.raises(ArrayTypeError, match="`values` from numpy, `support` from jax"):
        klquant.quantized_distribution(np.ones(3), JAX.asarray(np.ones(3)), num_quantized_bins=3)
