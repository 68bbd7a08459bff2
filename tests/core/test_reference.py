"""The oracle itself, against golden files made without it and numbers worked out by hand."""

from math import log

import numpy as np
import pytest

from klquant import InfeasibleError, reference
from support.cases import by_hand, even_edges, golden, golden_named

SLOW = ("bimodal_2001", "one_bin_2001")  # two seconds each; with infeasible candidates, with exact ties


@pytest.mark.parametrize("case", [*golden(255, 257, 509, 1001, 1021), *golden_named(*SLOW)])
def test_golden_curves(case):
    curve = reference.divergence_curve(case.hist)
    np.testing.assert_array_equal(np.isinf(curve), np.isinf(case.divergence))
    np.testing.assert_allclose(curve, case.divergence, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", golden(255, 257, 509))
def test_golden_thresholds(case):
    threshold, index = reference.optimal_threshold(case.hist, case.edges)
    assert index in case.ok_index
    assert threshold == case.edges[len(case.hist) // 2 + 127 + index + 1]


@pytest.mark.parametrize("case", by_hand())
def test_curves_by_hand(case):
    curve = reference.divergence_curve(np.array(case.hist), case.num_quantized_bins, case.eps)
    np.testing.assert_allclose(curve, case.divergence, rtol=0, atol=1e-15)


@pytest.mark.parametrize("case", by_hand())
def test_thresholds_by_hand(case):
    hist, edges = np.array(case.hist), even_edges(len(case.hist))
    threshold, index = reference.optimal_threshold(hist, edges, case.num_quantized_bins, case.eps)
    assert index == np.argmin(case.divergence)
    assert threshold == case.num_quantized_bins // 2 + index + 0.5


def test_nothing_feasible_is_an_error():
    with pytest.raises(InfeasibleError, match="feasible candidate, got none among 3"):
        reference.optimal_threshold(np.zeros(7, int), even_edges(7), 3)


def test_an_empty_histogram_has_no_percentile():
    with pytest.raises(InfeasibleError, match="empty histogram"):
        reference.percentile(np.zeros(7, int), even_edges(7), 50)


def test_outliers_go_to_the_end_bins():
    p = reference.reference_distribution(np.array([1, 2, 4, 8, 16, 32, 64]), 2, 5)
    assert p.tolist() == [1 + 2 + 4, 8, 16 + 32 + 64]


def test_smooth_by_hand():
    assert reference.smooth(np.array([0.0, 4, 6]), 0.5).tolist() == [0.5, 3.75, 5.75]
    assert reference.smooth(np.array([0.0, 4])).tolist() == [1e-4, 4 - 1e-4]
    assert reference.smooth(np.zeros(3)) is None
    assert reference.smooth(np.array([0.0, 9]), 1.0) is None
    assert reference.smooth(np.array([0.0, 0, 9, 0.125]), 0.25) is None


def test_kl_divergence_by_hand():
    assert reference.kl_divergence(np.array([1.0, 3]), np.array([2.0, 2])) == pytest.approx(
        log(0.5) / 4 + log(1.5) * 3 / 4, abs=1e-16
    )


def test_quantized_distribution_by_hand():
    values, support = np.array([0.0, 4, 1, 3, 6, 0, 0]), np.array([9.0, 4, 1, 3, 6, 0, 8])
    assert reference.quantized_distribution(values, support, 3).tolist() == [2, 2, 2, 2, 3, 0, 3]


def test_histogram_by_hand():
    x = np.array([-7.0, -3.0, -1.0, -0.9, 0.0, 0.9, 1.0, 2.9, 3.0])
    assert reference.histogram(x, 3.0, 3).tolist() == [3, 3, 3]
