import functools
import math

import numpy as np
import pytest

import klquant
from klquant.backends.collection import (
    Bins,
    Counted,
    Observation,
    Statistics,
    add_call,
    collect_counts,
    collect_growing,
    collect_ranges,
    count,
    empty,
    histograms_of,
    join,
    look,
    narrower_ranges,
    resolve_outliers,
)
from klquant.backends.collection.bins import HIGHEST, LOWEST, level_of
from klquant.backends.settings import Settings
from klquant.errors import InvalidInputError
from support.arrays import ArrayModel, as_data

NUM_BINS = 301
X = np.random.default_rng(0).normal(size=4000).astype(np.float32)


def grown(*parts, num_bins=NUM_BINS, max_amax=204800.0):
    """Return the statistics of one pass over these batches; it counts in three times as many bins."""
    settings = Settings(num_bins=num_bins, max_amax=max_amax, passes=1)
    return collect_growing(ArrayModel(), [{"x": part} for part in parts], settings)


def test_joining_takes_the_extremes_and_sums():
    bins = Bins(3, 4.0)
    a = Statistics({"x": Observation(-1.0, 0.5, 1, np.array([1, 2, 3]), bins, 2, 1), "y": Observation(0.0, 2.0, 3)}, 2)
    b = Statistics({"x": Observation(0.0, 4.0, 2, np.array([1, 0, 1]), bins, 0, 1), "z": Observation(0.0, 0.0)}, 1)
    both = {
        "x": (-1.0, 4.0, 2, [2, 2, 4], bins, 2, 2),
        "y": (0.0, 2.0, 3, None, None, 0, 0),
        "z": (0.0, 0.0, 1, None, None, 0, 0),
    }
    assert as_data(join(a, b)) == (both, 3)
    assert as_data(join(b, a)) == (both, 3)
    assert as_data(join(empty(), a)) == as_data(a) == as_data(join(a, empty()))


def test_calls_are_added_within_a_batch_and_their_maximum_taken_over_batches():
    total = empty()
    for calls in (2, 3, 1):
        found = {}
        for _ in range(calls):
            add_call(found, "fc", Observation(0.0, 1.0, 1, np.array([0, 1, 2]), Bins(3, 1.0)))
        total = join(total, Statistics(found, 1))
    assert total.tensors["fc"].calls == 3
    assert total.tensors["fc"].counts.tolist() == [0, 6, 12]


def test_int64_counts_add_up_beyond_what_float64_can_tell_apart():
    a = Statistics({"x": Observation(0.0, 1.0, 1, np.array([2**60, 1]), Bins(2, 1.0))}, 1)
    assert join(a, a).tensors["x"].counts.tolist() == [2**61, 2]


def test_what_cannot_be_added_is_refused_by_name():
    given = [Bins(3, 1.0), Bins(5, 1.0), Bins(3, 2.0), Bins(3, 3.0, 1)]
    a, *others = (Statistics({"fc": Observation(0.0, 1.0, 1, np.full(b.num_bins, 2**62), b)}, 1) for b in given)
    with pytest.raises(InvalidInputError, match=r"the counts of `fc` must stay below 2\*\*63"):
        join(a, a)
    for b in others:
        with pytest.raises(InvalidInputError, match="histograms of `fc` must have the same bins, got Bins"):
            join(a, b)


@pytest.mark.parametrize(("low", "high"), [(-3.0, 1.0), (-1.0, 3.0)])
def test_amax_is_the_larger_of_both_sides(low, high):
    assert Statistics({"x": Observation(low, high)}, 1).amax == {"x": 3.0}


@pytest.mark.parametrize(("low", "high"), [(math.nan, math.nan), (-math.inf, 1.0), (0.0, math.inf)])
def test_what_is_not_finite_is_refused_before_it_is_counted(low, high):
    def fail(*_):
        raise AssertionError

    with pytest.raises(InvalidInputError, match=r"activations must be finite, got (nan|inf)"):
        look("fc", low, high, fail, fail)


def test_a_tensor_is_counted_only_where_bins_are_given():
    def fail(bins):
        raise AssertionError

    assert look("fc", -2.0, 1.0, lambda name, amax: None, fail) == Observation(-2.0, 1.0)
    asked = []
    bins = Bins(3, 2.0)
    seen = look("fc", -2.0, 1.0, lambda *name_amax: asked.append(name_amax) or bins, lambda bins: Counted(bins, 7))
    assert asked == [("fc", 2.0)]
    assert seen == Observation(-2.0, 1.0, 1, bins, bins, 7, 0)


def test_values_beyond_the_bins_are_counted():
    x = np.array([-9.0, -2.0, 0.0, 0.0, 1.0, 2.0, 2.5])
    seen = look("fc", -9.0, 2.5, lambda name, amax: Bins(5, 2.0), functools.partial(count, x))
    assert (seen.zeros, seen.beyond) == (2, 2)
    assert seen.counts.tolist() == [2, 0, 2, 1, 2]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_counts_are_those_of_the_core(dtype):
    x = X.astype(dtype)
    assert (
        count(x, Bins(NUM_BINS, 2.5)).counts.tolist() == klquant.histogram(x, num_bins=NUM_BINS, amax=2.5).hist.tolist()
    )
    at_level = count(x, Bins(NUM_BINS, 3.0, 1)).counts
    assert at_level.tolist() == klquant.histogram(x.astype("f4"), num_bins=NUM_BINS, amax=3.0).hist.tolist()


def test_long_arrays_are_counted_in_chunks():
    x = np.tile(X, 50).reshape(10, -1)
    assert count(x, Bins(NUM_BINS, 9.0, 2)).counts.tolist() == (50 * count(X, Bins(NUM_BINS, 9.0, 2)).counts).tolist()


SCALES = [3.0**k for k in (-8, -3, -1, 0, 2, 5)] + [0.1, 1.0, 7.25, 100.0, 1000.0]


@pytest.mark.parametrize("num_bins", [255, 257, 301, 303, 4001])
@pytest.mark.parametrize("order", [1, -1])
def test_growing_ranges_give_the_same_counts_in_any_order(order, num_bins):
    parts = [X[k :: len(SCALES)] * np.float32(scale) for k, scale in enumerate(SCALES)][::order]
    edges = np.array([(2 * k + 1) / 2 for k in range(20)], np.float32)  # values on the edges of wide bins
    whole = grown(np.concatenate([*parts, edges]), num_bins=num_bins)
    total = grown(*parts, edges, num_bins=num_bins)
    assert as_data(total)[0] == as_data(whole)[0]
    assert total.tensors["x"].counts.sum() == len(X) + 20


def test_grown_counts_are_those_of_the_final_range():
    parts = [X / 9, X, 100 * X]
    seen = grown(*parts).tensors["x"]
    assert 3.0 ** (seen.bins.level - 1) <= 100 * np.abs(X).max() < seen.bins.amax == 3.0**seen.bins.level
    direct = klquant.histogram(np.concatenate(parts), num_bins=3 * NUM_BINS, amax=seen.bins.amax)
    assert seen.counts.tolist() == direct.hist.tolist()


def test_the_range_is_cut_to_what_is_there_and_no_count_is_lost():
    total = grown(X)
    histogram = histograms_of(total)["x"][0]
    amax, width = float(np.abs(X).max()), 2 * histogram.edges[-1] / len(histogram.hist)
    assert amax <= histogram.edges[-1] < amax + width
    assert len(histogram.hist) % 2 == 1
    assert NUM_BINS <= len(histogram.hist) <= 3 * NUM_BINS
    direct = klquant.histogram(X, num_bins=len(histogram.hist), amax=float(histogram.edges[-1]))
    assert histogram.hist.tolist() == direct.hist.tolist()


def test_values_beyond_the_cap_are_counted_in_the_end_bins():
    x = np.concatenate([X, np.array([1e30, -1e30, -1e31], np.float32)])
    total = grown(x, max_amax=4.5)
    assert total.tensors["x"].bins.level == 2
    assert total.amax == {"x": float(np.float32(1e31))}
    histogram, beyond = histograms_of(total, 4.5)["x"]
    assert beyond == 3
    assert histogram.hist.sum() == len(X) + 3
    width = 2 * 9 / (3 * NUM_BINS)
    assert 4.5 <= histogram.edges[-1] < 4.5 + width
    assert histogram.hist[0] - (-4.5 + width > X).sum() >= 2
    assert histogram.hist[-1] >= 1


@pytest.mark.parametrize(("amax", "level"), [(1e-30, LOWEST), (3.0, 2), (2.999, 1), (1.0, 1), (1e30, HIGHEST)])
def test_levels_have_room_for_their_values(amax, level):
    assert level_of(amax) == level
    seen = grown(np.array([amax, -amax]), max_amax=math.inf).tensors["x"]
    assert seen.bins.level == level
    assert seen.counts.sum() == 2
    assert np.array_equal(seen.counts, seen.counts[::-1])


def test_values_beyond_float32_are_counted_at_the_ends():
    assert count(np.array([1e300, -1e300, 0.0]), Bins(NUM_BINS, 3.0**HIGHEST, HIGHEST)).counts[[0, -1]].tolist() == [
        1,
        1,
    ]


def test_zeros_before_other_values_are_counted_and_zeros_alone_make_no_histogram():
    total, zeros = grown(np.zeros(5), X), grown(np.zeros(5))
    assert total.tensors["x"].counts.sum() == len(X) + 5
    assert as_data(total)[0] == as_data(grown(X, np.zeros(5)))[0]
    assert histograms_of(zeros) == {}
    assert (zeros.tensors["x"].zeros, total.tensors["x"].zeros) == (5, 5)


@pytest.mark.parametrize("outlier", [1e4, -1e7])
def test_a_tensor_with_an_outlier_is_counted_again_over_a_range_that_resolves_the_others(outlier):
    data = [{"x": np.tile(X, 4)}, {"x": np.append(X, np.float32(outlier))}, {"y": X}]
    settings = Settings(num_bins=NUM_BINS)
    amax = collect_ranges(ArrayModel(), data).amax
    coarse = collect_counts(ArrayModel(), data, amax, settings)
    fine = resolve_outliers(ArrayModel(), data, amax, settings, coarse)
    seen = fine.tensors["x"]
    assert 3 < seen.bins.amax < 200
    assert seen.counts[NUM_BINS // 2] < 0.5 * seen.counts.sum()
    assert seen.amax == abs(outlier)
    assert seen.beyond == 1 + 5 * (np.abs(X) > seen.bins.amax).sum()
    assert seen.counts.sum() == 5 * len(X) + 1
    assert fine.tensors["y"] is coarse.tensors["y"]
    assert narrower_ranges(fine) == {}


def test_values_that_fill_their_range_are_counted_once():
    model, data = ArrayModel(log=[]), [{"x": X}, {"x": np.zeros(10000)}]
    counts = collect_counts(model, data, {"x": float(np.abs(X).max())}, Settings(num_bins=NUM_BINS))
    resolve_outliers(model, data, {"x": 9.0}, Settings(), counts)
    assert model.log == [0, 1]
