import json
import math

import numpy as np
import pytest

import klquant
from klquant.backends.accuracy.classes import has_scores, top_classes
from klquant.backends.accuracy.comparison import Comparison, kind_of_agreement
from klquant.backends.accuracy.latency import interleaved_medians
from klquant.backends.accuracy.outputs import OutputComparison, check_labels, compare_outputs
from klquant.backends.accuracy.sums import Sums, compare_arrays

RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=(6, 4)).astype(np.float32)


def unit(array):
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def softmax(array):
    return np.exp(array) / np.exp(array).sum(-1, keepdims=True)


def one(pairs, labels=None):
    (found,) = compare_outputs(pairs, labels)
    return found


# --- sums ---


def test_sums_of_arrays_by_hand():
    assert compare_arrays(np.array([[3.0, -4.0]]), np.array([[3.0, -3.0]])) == (25.0, 1.0, 21.0, 18.0)


def test_only_where_the_reference_is_finite():
    x = np.array([3.0, np.inf, np.nan, 1.0])
    assert compare_arrays(x, np.array([3.0, 7.0, 7.0, 0.0])) == (10.0, 1.0, 9.0, 9.0)
    assert math.isnan(compare_arrays(np.ones(2), np.array([1.0, np.nan])).noise)


def test_sums_are_float64():
    x = np.full(3000, 1.1, np.float16)
    assert compare_arrays(x, 2 * x).signal == pytest.approx(3000 * float(x[0]) ** 2, rel=1e-13)


# --- what looks like scores ---


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (SCORES, True),
        (softmax(SCORES), True),
        (softmax(RNG.normal(size=(2, 5, 4))), True),
        (np.array([[0.2], [0.9]]), True),
        (np.eye(4), True),  # one-hot: probabilities before vectors of length 1
        (unit(SCORES), False),
        (RNG.normal(size=(2, 5, 4)), False),
        (np.array([[0.2], [1.9]]), False),
        (SCORES[0], False),
        (SCORES.astype(np.int64), False),
        (np.zeros((0, 4)), False),
        (np.array([[np.nan, 1.0]]), False),
    ],
)
def test_scores(values, expected):
    assert has_scores(values) is expected


def test_the_top_class_of_a_column_is_whether_it_is_above_one_half():
    assert top_classes(np.array([[0.2], [0.5], [0.9]])).tolist() == [0, 0, 1]
    assert top_classes(np.array([[1.0, 3.0, 2.0]])).tolist() == [1]


# --- comparison of outputs ---


def test_top1_and_accuracy_by_hand():
    floats = np.eye(4, dtype=np.float32) * 5
    others = floats[[0, 1, 3, 3]]  # the third is another class
    found = one([({"y": floats}, {"y": others})], np.array([0, 1, 3, 0]))
    assert (found.top1, found.float_accuracy, found.int8_accuracy) == (0.75, 0.5, 0.75)
    assert found.sqnr_db == pytest.approx(10 * math.log10(100 / 50))
    assert found.agreement == 0.75


def test_batches_add_up():
    other = SCORES + RNG.normal(size=SCORES.shape).astype(np.float32)
    labels = np.arange(6) % 4
    whole = one([({"y": SCORES}, {"y": other})], labels)
    parts = one([({"y": SCORES[a:b]}, {"y": other[a:b]}) for a, b in ((0, 1), (1, 4), (4, 6))], labels)
    assert parts[1:] == pytest.approx(whole[1:])


def test_the_agreement_without_scores_is_the_cosine():
    found = one([({"y": unit(SCORES)}, {"y": -unit(SCORES)})])
    assert math.isnan(found.top1)
    assert found.agreement == pytest.approx(-1)


def test_the_kind_of_agreement_is_that_of_all_outputs():
    scores, pixels = OutputComparison("a", 30.0, 1.0, 0.9), OutputComparison("b", 30.0, 1.0, math.nan)
    assert kind_of_agreement([scores, scores]) == "top-1"
    assert kind_of_agreement([pixels]) == "cosine"
    assert kind_of_agreement([scores, pixels]) == "agreement"


def test_an_output_that_is_no_number_is_the_worst():
    found = one([({"y": SCORES}, {"y": np.full_like(SCORES, np.nan)})])
    assert (found.sqnr_db, found.cosine) == (-math.inf, 0.0)


def test_only_floating_point_outputs_are_compared():
    pair = ({"y": SCORES, "k": np.arange(3)}, {"y": SCORES, "k": np.arange(4)})
    assert one([pair]).name == "y"


@pytest.mark.parametrize(
    ("pairs", "labels", "message"),
    [
        ([], None, "at least one batch with a floating point output"),
        ([({"k": np.arange(2)}, {"k": np.arange(2)})], None, "at least one batch with a floating point output"),
        ([({"y": SCORES}, {"y": SCORES[:2]})], None, r"batch 0: output `y` must have shape \(6, 4\) .* got \(2, 4\)"),
        ([({"y": SCORES}, {})], None, "batch 0: output `y` .* got none"),
        ([({"y": SCORES}, {"y": SCORES})], np.arange(5), "each of 6 samples, got 5"),
        ([({"y": SCORES[0]}, {"y": SCORES[0]})], np.arange(4), r"output of shape \(samples, classes\), got none"),
    ],
)
def test_what_does_not_fit_is_refused(pairs, labels, message):
    with pytest.raises(klquant.InvalidInputError, match=message):
        compare_outputs(pairs, labels)


def test_outputs_whose_shapes_vary_are_unknown():
    boxes = [np.ones((k, 4), np.float32) for k in (3, 3, 2)]
    pairs = [({"b": boxes[0], "y": SCORES}, {"b": other, "y": SCORES}) for other in boxes]
    unknown, known = compare_outputs(pairs, varying=True)
    assert (unknown.name, known.name, known.sqnr_db) == ("b", "y", math.inf)
    assert all(math.isnan(value) for value in (unknown.sqnr_db, unknown.cosine, unknown.agreement))
    with pytest.raises(klquant.InvalidInputError, match=r"batch 2: output `b` .* got \(2, 4\); .*a metric can compare"):
        compare_outputs(pairs)
    with pytest.raises(klquant.InvalidInputError, match="got none"):
        compare_outputs([({"y": SCORES}, {})], varying=True)


@pytest.mark.parametrize("labels", [[0.5], [[1]], [], "ab"])
def test_labels_are_integers(labels):
    with pytest.raises(klquant.InvalidInputError, match="`labels` must be integers"):
        check_labels(labels)


# --- the record ---


def test_the_record_is_short_and_complete():
    outputs = [OutputComparison("a", 20.0, 0.99, 0.9, 0.8, 0.7), OutputComparison("b", 30.0, 0.95, math.nan)]
    found = Comparison(outputs, math.nan, 4.0, 1.0, 4_000_000, 1_100_000, 3)
    assert (found.sqnr_db, found.agreement, found.time_ratio) == (20.0, 0.9, 0.25)
    assert repr(found) == "Comparison(SQNR 20.0 dB, agreement 0.9000; 1 against 4 ms (x 0.25), 1.1 against 4 MB)"
    content = json.loads(found.as_json(), parse_constant=pytest.fail)
    assert content["outputs"][1]["top1"] is None
    assert content["time_ratio"] == 0.25
    assert "<td" in found._repr_html_()
    assert "metric 0.5" in str(found._replace(metric=0.5))


def test_times_are_medians_of_calls_in_turns():
    calls = []
    times = interleaved_medians([lambda: calls.append(0), lambda: calls.append(1)], seconds=0.0, least=3)
    assert calls == [0, 1] * 4  # one call of each is not counted
    assert all(time >= 0 for time in times)


def test_no_sums_are_no_numbers():
    assert math.isnan(Sums().sqnr_db)
