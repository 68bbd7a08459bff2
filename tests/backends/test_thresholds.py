import logging
import math
import re
import warnings

import numpy as np
import pytest

import klquant
from klquant.backends.observed import Hidden
from klquant.backends.settings import LayerOptions
from klquant.backends.thresholds import search_thresholds
from klquant.errors import CalibrationWarning, InvalidInputError

NUM_BINS = 1001


def observed(data, amax=None):
    """Return amax and histogram of a tensor, as two passes would find them."""
    amax = float(abs(data).max()) if amax is None else amax
    return amax, klquant.histogram(data, num_bins=NUM_BINS, amax=amax)


def search(data, **options):
    amax, histogram = observed(data)
    return search_thresholds({"fc": amax}, {"fc": histogram}, **options)["fc"]


@pytest.fixture
def laplace():
    return np.random.default_rng(0).laplace(size=20_000)


@pytest.mark.filterwarnings("ignore:layer `fc`. expected SQNR:klquant.errors.CalibrationWarning")
def test_the_threshold_is_that_of_the_core_without_the_zeros(laplace):
    data = np.where(np.arange(laplace.size) % 10 == 0, laplace, 0.0)  # sparse, as after a ReLU
    amax, histogram = observed(data)
    cleared = histogram.hist.copy()
    cleared[NUM_BINS // 2] = 0
    expected = klquant.optimal_threshold(cleared, histogram.edges)
    assert float(expected) != float(klquant.optimal_threshold(*histogram))  # the zeros would count
    found = search(data, guard=False)
    assert found[:3] == (amax, float(expected), float(expected.divergence))
    assert found.sqnr_db == float(expected.sqnr_db)
    assert 0 < found.threshold < amax


def test_the_number_of_zeros_changes_the_share_and_not_the_threshold(laplace):
    few, many = search(laplace), search(np.concatenate([laplace, np.zeros(180_000)]))
    assert repr(few[:3]) == repr(many[:3])  # NaN is equal to NaN here
    assert many.clipped == pytest.approx(few.clipped / 10)


def test_the_clipped_share_is_that_of_the_values_beyond(laplace):
    found = search(laplace)
    beyond = np.abs(laplace) > found.threshold
    assert 0 < beyond.sum() < 200
    assert found.clipped == beyond.mean()


def test_the_histograms_are_not_changed(laplace):
    amax, histogram = observed(laplace)
    before = histogram.hist.tobytes(), histogram.edges.tobytes()
    assert histogram.hist[NUM_BINS // 2] > 0
    search_thresholds({"fc": amax}, {"fc": histogram})
    assert (histogram.hist.tobytes(), histogram.edges.tobytes()) == before
    for array in histogram:
        array.flags.writeable = False
    search_thresholds({"fc": amax}, {"fc": histogram})


def test_layers_are_searched_one_by_one_in_their_order(laplace):
    named = {name: observed(laplace[:k]) for name, k in (("b", 20_000), ("a", 500), ("c.0", 5_000))}
    found = search_thresholds({k: v[0] for k, v in named.items()}, {k: v[1] for k, v in named.items()})
    assert list(found) == ["b", "a", "c.0"]
    assert repr(found["a"]) == repr(search(laplace[:500]))  # NaN is equal to NaN here
    assert repr(found["c.0"]) == repr(search(laplace[:5_000]))


def test_scaling_by_a_power_of_two_scales_the_threshold(laplace):
    one, eight = search(laplace), search(8 * laplace)
    assert eight.threshold == 8 * one.threshold
    assert repr(eight[2:]) == repr(one[2:])


def test_the_maximum_is_amax(laplace):
    found = search(laplace, criterion="max")
    amax = abs(laplace).max()
    assert found[:2] == (amax, amax)
    assert math.isnan(found.divergence)
    assert found.clipped == 0


@pytest.mark.parametrize("criterion", ["kl", "", None, "Entropy"])
def test_another_criterion_is_refused(laplace, criterion):
    with pytest.raises(InvalidInputError, match="`criterion` must be one of entropy, max, percentile, mse, got"):
        search(laplace, criterion=criterion)


@pytest.mark.parametrize("criterion", ["entropy", "max"])
def test_a_tensor_of_zeros_gets_scale_1_and_a_warning_that_names_it(criterion):
    with pytest.warns(CalibrationWarning, match=r"layer `block\.fc`: all its values are 0; it gets scale 1"):
        found = search_thresholds({"block.fc": 0.0}, {}, criterion=criterion)["block.fc"]
    assert found.threshold / 127 == 1.0
    assert (found.amax, found.clipped) == (0.0, 0.0)


def test_a_tensor_without_a_feasible_threshold_gets_amax_and_a_warning_that_names_it():
    amax, histogram = observed(np.array([1e-9, -1e-9]), amax=3.0)  # all in the centre, which is cleared
    with pytest.warns(CalibrationWarning, match=r"layer `fc`: no threshold is feasible; it gets T = amax = 3\.0"):
        found = search_thresholds({"fc": amax}, {"fc": histogram})["fc"]
    assert found[:2] == (3.0, 3.0)
    assert math.isnan(found.divergence)
    assert found.clipped == 0


def test_one_warning_for_each_layer_and_the_others_are_still_searched(laplace):
    amax, histogram = observed(laplace)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = search_thresholds({"a": 0.0, "fc": amax, "b": 0.0}, {"fc": histogram})
    assert [str(warning.message)[:9] for warning in caught] == ["layer `a`", "layer `b`"]
    assert repr(found["fc"]) == repr(search(laplace))  # NaN is equal to NaN here


def test_a_layer_without_a_histogram_is_refused_by_name():
    with pytest.raises(InvalidInputError, match="layer `fc` has an amax but no histogram"):
        search_thresholds({"fc": 1.0}, {})


def test_nothing_observed_gives_no_thresholds():
    assert search_thresholds({}, {}) == {}


# --- found wrong while these tests were written ---


def test_the_warning_points_at_the_caller():
    with pytest.warns(CalibrationWarning) as caught:
        search_thresholds({"fc": 0.0}, {})
    assert caught[0].filename == __file__


def test_mse_for_very_many_bins_and_levels_is_refused_and_left_out_of_comparisons(laplace):
    edges = klquant.histogram(np.zeros(0), num_bins=65_537, amax=8.0).edges
    histogram = klquant.Histogram(np.ones(65_537, np.int64), edges)
    with pytest.raises(
        InvalidInputError, match=r"layer `fc`: the mse criterion takes at most .* bins x levels, got 65537 x 4095"
    ):
        search_thresholds({"fc": 8.0}, {"fc": histogram}, criterion="mse", options={"fc": LayerOptions(num_bits=12)})
    found = search_thresholds({"fc": 8.0}, {"fc": histogram}, options={"fc": LayerOptions("percentile", 12)})
    assert 7.9 < found["fc"].threshold <= 8.0


def test_a_threshold_that_is_given_stays_where_nothing_but_zeros_was_counted():
    histogram = klquant.Histogram(np.eye(1, NUM_BINS, NUM_BINS // 2, dtype=np.int64)[0], observed(np.ones(1))[1].edges)
    found = search_thresholds({"fc": 1.0}, {"fc": histogram}, options={"fc": LayerOptions(threshold=0.5)})["fc"]
    assert (found.threshold, found.clipped, found.criterion) == (0.5, 0.0, "fixed")


def test_a_threshold_far_beyond_bins_that_are_tiny_clips_nothing():
    histogram = klquant.histogram(np.linspace(-1e-300, 1e-300, 5000), num_bins=255)
    found = search_thresholds({"fc": 1e-300}, {"fc": histogram}, options={"fc": LayerOptions(threshold=1e9)})["fc"]
    assert (found.threshold, found.clipped, found.sqnr_db) == (1e9, 0.0, 0.0)


def many(number):
    """Return histograms of heavy tails, which KL clips hard, more so from one to the next."""
    rng = np.random.default_rng(0)
    data = {f"l{k}": rng.standard_t(2 - k / 20, size=20000) for k in range(number)}
    amax = {name: float(np.abs(x).max()) for name, x in data.items()}
    return amax, {name: klquant.histogram(x, num_bins=2001, amax=amax[name]) for name, x in data.items()}


def test_many_complaints_are_one_warning_with_the_worst_and_text_to_paste():
    with pytest.warns(CalibrationWarning) as caught:
        found = search_thresholds(*many(8), guard=False)
    (record,) = caught
    message, better = str(record.message), record.message.better
    assert re.match(r"[4-8] of 8 layers need attention; the worst: `l\d`: .*; `l\d`: .*; `l\d`: ", message)
    assert (
        f"to take the better criterion pass overrides={ {k: {'criterion': v} for k, v in better.items()} }" in message
    )
    options = {name: LayerOptions(criterion) for name, criterion in better.items()}
    assert all(search_thresholds(*many(8), options=options)[n].sqnr_db > found[n].sqnr_db for n in better)


def test_few_complaints_are_a_warning_each():
    with pytest.warns(CalibrationWarning) as caught:
        search_thresholds(*many(2), guard=False)
    assert [re.match(r"layer `(\w+)`", str(one.message))[1] for one in caught] == ["l0", "l1"]


def test_the_guard_takes_the_better_criterion_without_a_warning_and_records_it(caplog):
    caplog.set_level(logging.INFO, "klquant")
    amax, histograms = many(8)
    amax["fine"], histograms["fine"] = observed(np.random.default_rng(0).normal(size=200_000))
    found = search_thresholds(amax, histograms)
    with pytest.warns(CalibrationWarning):
        literal = search_thresholds(amax, histograms, guard=False)
    best = {name: search_thresholds(amax, histograms, criterion=name) for name in ("mse", "max")}
    changed = [name for name, layer in found.items() if layer.replaced]
    assert 4 <= len(changed) < 9
    for name, layer in found.items():
        if name in changed:
            better = max((best[criterion][name] for criterion in best), key=lambda one: one.sqnr_db)
            assert layer[:2] == better[:2]
            assert (layer.criterion, layer.replaced) == (better.criterion, "entropy")
            assert layer.gain_db == better.sqnr_db - literal[name].sqnr_db
            assert layer.how == f"entropy -> {layer.criterion}: {layer.gain_db:.1f} dB"
        else:
            assert layer == literal[name]._replace(guarded=True)
            assert layer.how == "entropy"
    worst = max(changed, key=lambda name: found[name].gain_db)
    assert f"guard: {len(changed)} of 9 tensors changed, most `{worst}`: {found[worst].how}" in caplog.messages


@pytest.mark.parametrize("criterion", ["entropy", "percentile"])
def test_a_criterion_that_the_options_of_a_layer_name_is_kept_with_a_warning(criterion):
    amax, histograms = many(1)
    options = {"l0": LayerOptions(criterion, percentile=95)}
    with pytest.warns(CalibrationWarning, match="layer `l0`: "):
        found = search_thresholds(amax, histograms, options=options)["l0"]
    assert (found.criterion, found.replaced) == (criterion, "")


def test_a_criterion_for_all_layers_other_than_entropy_is_kept():
    amax, histograms = many(1)
    options = {"l0": LayerOptions(percentile=95)}
    with pytest.warns(CalibrationWarning, match="layer `l0`: "):
        found = search_thresholds(amax, histograms, criterion="percentile", options=options)["l0"]
    assert (found.criterion, found.replaced) == ("percentile", "")


@pytest.mark.parametrize("num_bits", [3, 4, 8])
@pytest.mark.parametrize("spread", [0.05, 0.1, 0.5])
def test_the_guard_never_clips_most_values(spread, num_bits):
    data = 5 + spread * np.random.default_rng(0).normal(size=20_000)  # away from zero: KL finds nothing to lose
    options = {"fc": LayerOptions(num_bits=num_bits)}
    with pytest.warns(CalibrationWarning):
        assert search(data, options=options, guard=False).clipped > 0.9
    found = search(data, options=options)
    assert found.replaced == "entropy"
    assert found.clipped < (1e-3 if num_bits == 8 else 0.6)  # with few levels it is best to have one at the mean
    assert found.sqnr_db >= search(data, criterion="max", options=options).sqnr_db


def test_what_nothing_helps_is_still_warned_of_after_the_guard():
    amax, histogram = observed(np.append(np.random.default_rng(0).standard_t(1.5, size=20_000), 1e6))
    with pytest.warns(CalibrationWarning, match="of its non-zero values are in the centre bin"):
        search_thresholds({"fc": amax}, {"fc": histogram}, hidden={"fc": Hidden(zeros=0)})
