"""The strategies and oracles that users import: each assertion accepts what is right and finds a planted fault."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument

import klquant
from klquant import reference, testing

SLOW = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
FEW = settings(max_examples=20, **SLOW)
X = np.array([-9.0, -0.75, -0.25, 0.0, 0.25, 0.3, 0.75, 2.6, 100.0])


def fake(x, scale=0.5):
    return klquant.fake_quantize(x, scale)


@pytest.mark.parametrize("shape", [*testing.COUNT_SHAPES, *testing.WEIGHT_SHAPES])
@FEW
@given(st.data())
def test_histograms_are_valid_for_every_search(shape, data):
    case = data.draw(testing.histograms(sizes=[(15, 3), (33, 15)], shapes=[shape]))
    assert case.hist.dtype == (np.int64 if shape in testing.COUNT_SHAPES else np.float64)
    assert len(case.edges) == len(case.hist) + 1
    klquant.divergence_curve(case.hist, case.edges, num_quantized_bins=case.num_quantized_bins)


@FEW
@given(testing.histograms(equal_bins=True))
def test_bins_are_equal_if_asked(case):
    np.testing.assert_allclose(np.diff(case.edges), 2 * case.edges[-1] / len(case.hist), rtol=1e-9)
    np.testing.assert_array_equal(case.edges, -case.edges[::-1])


def test_bins_have_any_width_otherwise():
    find(testing.edges(15), lambda edges: np.ptp(np.diff(edges)) > 0.1 * edges[-1], settings=settings(**SLOW))


def test_an_unknown_shape_is_refused():
    for draw in (lambda: testing.counts(15, shape="round"), lambda: testing.histograms(shapes=["round"])):
        with pytest.raises(InvalidArgument, match=r"must be one of dense, sparse, .* got 'round'"):
            draw()


@FEW
@given(st.data())
def test_the_same_counts_are_stored_in_many_ways(data):
    hist = data.draw(testing.counts(15))
    stored = data.draw(testing.same_counts(hist))
    assert stored.tolist() == hist.tolist()
    assert stored.dtype.kind in "iu"


def test_some_of_them_are_read_only_or_not_contiguous():
    hist = np.arange(15)
    for wanted in (lambda a: not a.flags.writeable, lambda a: not a.flags.contiguous, lambda a: a.dtype == ">i2"):
        find(testing.same_counts(hist), wanted, settings=settings(**SLOW))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@FEW
@given(st.data())
def test_data_have_the_dtype_and_the_limit(dtype, data):
    x = data.draw(testing.activations(dtype=dtype, max_size=5, limit=1e4))
    assert x.dtype == dtype
    assert x.size <= 5
    assert (np.abs(x) <= 1e4).all()
    scale = data.draw(testing.scales(dtype=dtype))
    assert 2.0**-13 <= scale <= 2.0**13
    assert float(np.dtype(dtype).type(scale)) == scale
    halfway = data.draw(testing.halfway_values(scale, dtype=dtype, most=9))
    assert halfway.dtype == dtype
    assert (np.abs(halfway.astype(float) / scale * 2 - np.rint(halfway.astype(float) / scale * 2)) < 0.02).all()


@FEW
@given(st.data())
def test_the_nearest_levels_are_those_of_klquant(data):
    scale = data.draw(testing.scales(dtype="float64"))
    x = data.draw(testing.activations(dtype="float64") | testing.halfway_values(scale, dtype="float64"))
    levels = klquant.quantize(x, scale)
    testing.assert_nearest_levels(levels, x, scale)
    testing.assert_fake_quantizer(lambda x: fake(x, scale), x, scale)


def test_nearest_levels_round_half_to_even_and_saturate():
    x = np.array([[0.25, 0.75, -0.75], [np.inf, -np.inf, 1e9]])
    assert testing.nearest_levels(x, 0.5, num_quantized_bins=15).tolist() == [[0, 2, -2], [7, -7, 7]]


@pytest.mark.parametrize(
    ("levels", "tolerance", "message"),
    [
        ([1, 2], 1e-6, r"0.3 / 0.5 must become level 1, got 2 \(value 1\)"),
        ([0, 1], 0, None),
        ([1, 1], 1e-6, None),  # half-way: either is right
        ([1, 1], 0, "0.25 / 0.5 must become level 0, got 1"),
        ([-1, 1], 1e-6, "level 0, got -1"),
        ([0.5, 1], 1e-6, r"integers, got 0.5 \(value 0\)"),
        ([0], 0, "expected levels of shape"),
    ],
)
def test_a_wrong_level_is_found(levels, tolerance, message):
    def check():
        testing.assert_nearest_levels(np.array(levels), [0.25, 0.3], 0.5, tolerance=tolerance)

    if message is None:
        check()
    else:
        with pytest.raises(AssertionError, match=message):
            check()


def test_levels_beyond_the_range_are_found():
    with pytest.raises(AssertionError, match="level 127, got 128"):
        testing.assert_nearest_levels(np.array([128]), [64.0], 0.5)


WRONG = {
    "floor": lambda x: np.clip(np.floor(x / 0.5), -127, 127) * 0.5,
    "half up": lambda x: np.clip(np.floor(x / 0.5 + 0.5), -127, 127) * 0.5,
    "-128 used": lambda x: np.clip(np.rint(x / 0.5), -128, 127) * 0.5,
    "no clipping": lambda x: np.rint(x / 0.5) * 0.5,
    "another scale": lambda x: np.clip(np.rint(x / 0.5), -127, 127) * 0.51,
    "another dtype": lambda x: fake(x).astype(np.float32),
    "another shape": lambda x: fake(x)[None],
    "in place": lambda x: fake(x.__imul__(1.5)),
    "not finite": lambda x: fake(x) + np.nan,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_fake_quantizer_is_found(name):
    x = np.append(X, -64.0)
    testing.assert_fake_quantizer(fake, x.copy(), 0.5)
    with pytest.raises(AssertionError):
        testing.assert_fake_quantizer(WRONG[name], x.copy(), 0.5)


@pytest.mark.parametrize(
    ("law", "wrong"),
    [
        (testing.assert_symmetric, np.floor),
        (testing.assert_monotone, np.abs),
        (testing.assert_idempotent, lambda x: x / 2),
    ],
)
def test_a_broken_law_is_found(law, wrong):
    law(fake, X)
    with pytest.raises(AssertionError):
        law(wrong, X)


def test_a_histogram_is_compared_value_by_value():
    x = np.array([-3.0, -1.0, 0.0, 0.999, 1.0, 9.0])
    hist, edges = klquant.histogram(x, num_bins=3, amax=3.0)
    testing.assert_counts(hist, edges, x)
    with pytest.raises(AssertionError, match="counts"):
        testing.assert_counts(np.histogram(x, edges)[0], edges, x)  # 9.0 is missing
    with pytest.raises(AssertionError, match="edges"):
        testing.assert_counts(hist, [-3, -0.5, 0.5, 3], x)


def test_a_wrong_partition_is_found():
    testing.assert_merge_partition(klquant.merge_partition(11, num_quantized_bins=5), 11, num_quantized_bins=5)
    for bounds in ([0, 2, 4, 6, 8, 10], [0, 2, 4, 6, 9, 11], [0, 2, 4, 5, 8, 11], [1, 2, 4, 6, 8, 11]):
        with pytest.raises(AssertionError, match=r"every bin|groups must"):
            testing.assert_merge_partition(bounds, 11, num_quantized_bins=5)


def test_a_wrong_merge_is_found():
    hist = np.array([2, 4, 0, 3, 5, 5, 1])
    right = klquant.quantized_distribution(hist, hist, num_quantized_bins=3)
    testing.assert_merged(right, hist, hist, num_quantized_bins=3)
    for k, value in ((0, 2.5), (2, 1.0), (6, 0.0)):
        wrong = np.where(np.arange(7) == k, value, right)
        with pytest.raises(AssertionError):
            testing.assert_merged(wrong, hist, hist, num_quantized_bins=3)


@pytest.mark.parametrize("one_sided", [False, True])
def test_only_the_best_candidate_is_optimal(one_sided):
    hist, options = np.array([1, 0, 2, 9, 30, 8, 3, 1, 1]), {"num_quantized_bins": 3, "one_sided": one_sided}
    found = klquant.optimal_threshold(hist, np.linspace(-1, 1, 10), **options)
    testing.assert_optimal(found.index, hist, **options)
    curve = (reference.one_sided_divergence_curve if one_sided else reference.divergence_curve)(hist, 3)
    for k in {*range(len(curve))} - {int(found.index)}:
        with pytest.raises(AssertionError, match=f"candidate {int(found.index)} has .* nats less than {k}"):
            testing.assert_optimal(k, hist, **options)
    for k in (None, -1, len(curve)):
        with pytest.raises(AssertionError, match="is feasible, got"):
            testing.assert_optimal(k, hist, **options)


def test_an_empty_histogram_has_no_optimum():
    testing.assert_optimal(None, np.zeros(9), num_quantized_bins=3)
    testing.assert_optimal(-1, np.zeros(9), num_quantized_bins=3)
    with pytest.raises(AssertionError, match="no candidate is feasible, got 2"):
        testing.assert_optimal(2, np.zeros(9), num_quantized_bins=3)


def test_an_addition_that_depends_on_the_order_is_found():
    a, b, c, zero = (klquant.histogram(x, num_bins=3, amax=1.0) for x in ([X, X[:3], X[2:], X[:0]]))
    testing.assert_monoid(klquant.merge, a, b, c, zero=zero)
    for wrong in (lambda a, b: a, np.subtract, lambda a, b: a + b + 1):
        with pytest.raises(AssertionError):
            testing.assert_monoid(wrong, a.hist, b.hist, c.hist, zero=zero.hist)


def test_without_hypothesis_the_error_names_the_extra():
    code = "import sys; sys.modules['hypothesis'] = None\nimport klquant, klquant.testing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MissingDependencyError: klquant.testing needs Hypothesis: pip install 'klquant[testing]'" in done.stderr


def test_klquant_does_not_import_hypothesis():
    code = "import klquant, klquant.presets, klquant.reference, sys; print('hypothesis' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
