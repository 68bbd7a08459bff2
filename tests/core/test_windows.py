import numpy as np
import pytest

from klquant._namespace import compiled
from klquant._search.closed_form import prepare
from klquant._search.prefix_sums import counts_between, filled_between, sum_up


@compiled
def window_sum(values, *, xp, low, high):
    return counts_between(sum_up(values, 0, xp=xp), low, high, xp=xp)


@pytest.mark.parametrize(
    ("values", "low", "high", "expected"),
    [
        ([2**61, 1, 2, 3], 1, 4, 6),
        ([2**61, 2**61, 1], 2, 3, 1),
        ([2.0**61, 1, 0.25], 1, 3, 1.25),
        ([3, 1, 4], 0, 3, 8),
        ([3, 1, 4], 2, 2, 0),
        ([0.5, 0.25, 4.125], 0, 3, 4.875),
    ],
)
def test_sums_are_exact_behind_a_huge_bin(xp, values, low, high, expected):
    total = xp.call(window_sum, xp.asarray(values), low=low, high=high)
    assert total.dtype == np.float64
    assert float(total) == expected


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32", "uint32"])
def test_small_integers_do_not_overflow(xp, dtype):
    most = np.iinfo(dtype).max
    assert float(xp.call(window_sum, xp.asarray([most] * 5, dtype), low=0, high=5)) == 5 * most


def test_a_window_counts_its_filled_bins():
    sums = sum_up(np.array([0, 3, 0, 1e-300, 7]), 2, xp=np)
    assert int(filled_between(sums, 0, 5)) == 3
    assert int(filled_between(sums, 1, 4)) == 2
    assert int(filled_between(sums, 0, 7)) == 3  # the padding holds nothing


def test_weights_far_below_the_total_keep_their_digits():
    weights = np.array([1e12, 0.0, 1.2345678901234567e-9])
    sums = sum_up(weights, 0, xp=np)
    assert float(counts_between(sums, 1, 3, xp=np)) == pytest.approx(1.2345678901234567e-9, rel=1e-11)


@pytest.mark.parametrize(("total", "lost"), [(10**15, 1), (10**12, 7), (2**62, 3)])
def test_a_small_loss_keeps_its_digits(total, lost):
    search = prepare(np.array([lost, 0, 0, total, 0, 0, 0]), 3, 1e-4, False, xp=np)
    assert search.window.log_kept[-1] == pytest.approx(-lost / (total + lost), rel=1e-12)
