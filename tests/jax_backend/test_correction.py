"""Zero points and bias correction: both forms agree, errors shrink, and every kind of body has its own correction."""

import jax
import numpy as np
import pytest
from jax import lax

from klquant.backends.jax import calibrate, export, quantize, requantize
from klquant.errors import InvalidInputError
from support.jax_networks import loops, loops_params, random_batches, s8_products, sqnr_db

pytestmark = pytest.mark.filterwarnings("ignore:layer `:klquant.errors.CalibrationWarning")
RNG = np.random.default_rng(0)
WEIGHTS = {"w": RNG.standard_normal((16, 8)).astype(np.float32)}
POSITIVE = np.abs(random_batches(64)[0]) ** 2
OPTIONS = {"num_bins": 1001, "criterion": "max"}


def product(params, x):
    return x @ params["w"]


def forms(f, params, batch, **options):
    """Return a function in INT8 and its simulation, from one calibration."""
    calibration = calibrate(f, params, [batch], num_bins=1001)
    return [requantize(f, params, batch, calibration, form=form, **options) for form in ("int8", "simulate")]


def test_positive_activations_get_all_levels():
    exact = product(WEIGHTS, POSITIVE)
    symmetric, asymmetric = (quantize(product, WEIGHTS, [POSITIVE], zero_points=a, **OPTIONS) for a in (False, True))
    assert symmetric.ranges == {}
    assert asymmetric.ranges["w"] == pytest.approx((0, POSITIVE.max()))
    assert s8_products(asymmetric.function, WEIGHTS, POSITIVE) == {"dot_general": 1}
    step = POSITIVE.max() / np.float32(255)
    levels = np.clip(np.round(POSITIVE / step) - 128, -128, 127).astype(np.int64) + 128
    steps = np.abs(WEIGHTS["w"]).max(axis=0) / np.float32(127)
    expected = levels @ np.round(WEIGHTS["w"] / steps).astype(np.int64) * (steps * step)
    np.testing.assert_allclose(asymmetric.function(WEIGHTS, POSITIVE), expected, rtol=1e-5, atol=1e-5)
    errors = [sqnr_db(exact, result.function(WEIGHTS, POSITIVE)) for result in (symmetric, asymmetric)]
    assert errors[1] > errors[0] + 2


def test_values_on_both_sides_keep_their_grid():
    both = np.concatenate([POSITIVE, -POSITIVE])
    assert quantize(product, WEIGHTS, [both], zero_points=True, **OPTIONS).ranges == {}
    skewed = np.concatenate([POSITIVE, np.full((1, 16), -0.1, np.float32)])
    low, high = quantize(product, WEIGHTS, [skewed], zero_points=True, **OPTIONS).ranges["w"]
    assert low == pytest.approx(-0.1)
    assert high == pytest.approx(POSITIVE.max())
    assert quantize(product, WEIGHTS, [POSITIVE], zero_points=True, num_bits=6, **OPTIONS).ranges == {}


def test_both_forms_agree_in_bodies_and_products_of_activations():
    params, x = loops_params(), np.abs(random_batches(64)[0])
    exact = loops(params, x)
    int8, simulated = forms(loops, params, x, zero_points=True, correction_batches=[x])
    assert {"first", "encoder/block"} <= int8.ranges.keys()
    assert int8.corrections.keys() == {"first", "encoder/block", "last"}
    found, close = int8.function(params, x), simulated.function(params, x)
    for name in exact:
        np.testing.assert_allclose(found[name], close[name], atol=1e-4)
        assert sqnr_db(exact[name], found[name]) > 34
    assert s8_products(int8.function, params, x) == {"dot_general": 4}


def test_two_operands_with_zero_points():
    def gram(params, x):
        return x @ x.T

    int8, simulated = forms(gram, {}, POSITIVE, zero_points=True)
    assert int8.ranges.keys() == {"dot_general.lhs", "dot_general.rhs"}
    np.testing.assert_allclose(int8.function({}, POSITIVE), simulated.function({}, POSITIVE), rtol=1e-5, atol=1e-3)


def test_convolutions_pad_with_the_level_of_zero():
    image = np.abs(RNG.standard_normal((2, 9, 9, 4))).astype(np.float32)
    kernel = RNG.standard_normal((3, 3, 2, 6)).astype(np.float32)

    def network(params, x):
        names, turned = ("NHWC", "HWIO", "NHWC"), params["k"].transpose(3, 2, 0, 1)
        options = {"lhs_dilation": (1, 2), "dimension_numbers": names, "feature_group_count": 2}
        x = jax.nn.relu(lax.conv_general_dilated(x, params["k"], (2, 1), [(1, 2), (3, -1)], **options))
        return lax.conv_general_dilated(x.transpose(0, 3, 1, 2)[:, :2], turned, (1, 1), [(1, 1), (2, 0)])

    params = {"k": kernel}
    exact = network(params, image)
    int8, simulated = forms(network, params, image, zero_points=True, correction_batches=[image])
    assert len(int8.ranges) == 2
    np.testing.assert_allclose(int8.function(params, image), simulated.function(params, image), atol=1e-3)
    assert sqnr_db(exact, int8.function(params, image)) > 35
    assert s8_products(int8.function, params, image) == {"convolution": 2}
    means = np.mean(np.asarray(int8.function(params, image)) - exact, axis=(0, 2, 3))
    uncorrected = requantize(network, params, image, int8.calibration, zero_points=True)
    before = np.mean(np.asarray(uncorrected.function(params, image)) - exact, axis=(0, 2, 3))
    assert np.abs(means).max() < np.abs(before).max() / 2


def test_the_mean_of_each_channel_is_exact_on_the_data():
    batches = [POSITIVE[:40], POSITIVE[40:]]
    plain, corrected = (quantize(product, WEIGHTS, batches, correct_bias=c, **OPTIONS) for c in (False, True))
    exact = product(WEIGHTS, POSITIVE).mean(axis=0)
    shifts = exact - np.asarray(plain.function(WEIGHTS, POSITIVE)).mean(axis=0)
    np.testing.assert_allclose(np.asarray(corrected.function(WEIGHTS, POSITIVE)).mean(axis=0), exact, atol=1e-5)
    assert corrected.corrections == {"w": pytest.approx(np.abs(shifts).max(), rel=1e-3)}
    assert plain.corrections == {}


def test_each_iteration_of_a_scan_has_its_own_correction():
    params = {"blocks": loops_params()["blocks"]}

    def each(params, x):
        return lax.scan(lambda x, w: (x, (x @ w).mean(axis=0)), x, params["blocks"])[1]

    exact = each(params, POSITIVE)
    int8 = quantize(each, params, [POSITIVE], correct_bias=True, **OPTIONS)
    plain = requantize(each, params, POSITIVE, int8.calibration)
    errors = [np.abs(np.asarray(one.function(params, POSITIVE)) - exact).max(axis=1) for one in (int8, plain)]
    assert errors[0].max() < 1e-5
    assert errors[1].min() > 1e-3


def test_gradients_pass_where_nothing_is_clipped():
    overrides = {"w": {"criterion": "percentile", "percentile": 90.0}}
    trained = quantize(
        product, WEIGHTS, [POSITIVE], form="simulate", straight_through=True, zero_points=True, overrides=overrides
    )
    share = POSITIVE / trained.ranges["w"].high
    passed = np.asarray(jax.grad(lambda x: trained.function(WEIGHTS, x).sum())(POSITIVE))
    clipped = share > 1 + 1 / 255
    assert 0 < clipped.mean() < 0.5
    np.testing.assert_array_equal(passed[clipped], 0)
    assert (passed[share < 1] != 0).all()


def test_corrected_functions_can_be_exported():
    int8 = quantize(product, WEIGHTS, [POSITIVE], zero_points=True, correct_bias=True, **OPTIONS)
    pytest.importorskip("flatbuffers")
    loaded = jax.export.deserialize(export(int8, WEIGHTS, POSITIVE).serialize())
    np.testing.assert_allclose(loaded.call(POSITIVE), int8.function(WEIGHTS, POSITIVE), rtol=1e-5, atol=1e-5)


def test_data_that_cannot_serve_are_errors():
    with pytest.raises(InvalidInputError, match="correct_bias=False"):
        quantize(product, WEIGHTS, iter([POSITIVE]), correct_bias=True, passes=1)
    calibration = calibrate(product, WEIGHTS, [POSITIVE], **OPTIONS)
    with pytest.raises(InvalidInputError, match="at least one calibration batch"):
        requantize(product, WEIGHTS, POSITIVE, calibration, correction_batches=[])
    with pytest.raises(InvalidInputError, match="activations must be finite"):
        requantize(product, WEIGHTS, POSITIVE, calibration, correction_batches=[POSITIVE * np.nan])
