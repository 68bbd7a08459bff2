"""Quantized functions: products of integers, equal to their simulation, accurate, and named where they are not."""

import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import klquant
from klquant.backends.jax import QuantizedFunction, calibrate, export, quantize, requantize, sensitivity
from klquant.errors import CalibrationWarning, InvalidInputError, ModelError
from support.jax_networks import loops, loops_params, random_batches, s8_products, sqnr_db
from support.namespaces import enable_x64

pytestmark = pytest.mark.filterwarnings("ignore:layer `[^`]*`. (T =|expected SQNR):klquant.errors.CalibrationWarning")
PARAMS = {"w": np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32), "b": np.ones(8, np.float32)}
[X] = random_batches(64)
OPTIONS = {"num_bins": 1001, "criterion": "max"}


def affine(params, x):
    return x @ params["w"] + params["b"]


@pytest.fixture(scope="module")
def in_loops():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        params = loops_params()
        int8 = quantize(loops, params, [X], num_bins=1001)
        return params, int8, requantize(loops, params, X, int8.calibration, form="simulate")


def test_a_product_is_what_klquant_computes():
    result = quantize(affine, PARAMS, [X], **OPTIONS)
    x = klquant.quantize(X, klquant.scale(float(np.abs(X).max()))).astype(np.int64)
    scales = np.abs(PARAMS["w"]).max(axis=0) / np.float32(127)
    levels = klquant.quantize(PARAMS["w"], scales, axis=1).astype(np.int64)
    expected = x @ levels * (scales * np.float32(result.thresholds["w"].scale)) + 1
    np.testing.assert_allclose(result.function(PARAMS, X), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(result.weight_scales["w"], scales, rtol=1e-6)
    assert result.form == "int8"
    assert "1 activations" in result._repr_html_()
    assert repr(result) == "QuantizedFunction(int8: 1 activations quantized, 0 skipped)"


def test_products_in_bodies_are_quantized(in_loops):
    params, int8, simulated = in_loops
    exact, found, close = (f(params, X) for f in (loops, int8.function, simulated.function))
    for name in exact:
        assert sqnr_db(exact[name], found[name]) > 25
        np.testing.assert_allclose(found[name], close[name], atol=1e-4)
    assert int8.skipped == {"never": "it was never called"}
    assert s8_products(int8.function, params, X) == {"dot_general": 4}
    assert s8_products(simulated.function, params, X) == {}


def test_other_shapes_and_parameters_may_be_passed(in_loops):
    params, int8, _ = in_loops
    np.testing.assert_allclose(int8.function(params, X[:5])["out"], int8.function(params, X)["out"][:5], atol=1e-4)
    other = int8.function({**params, "bias": params["bias"] + 1000}, X)["out"]
    assert np.abs(other - int8.function(params, X)["out"]).max() > 1
    doubled = quantize(affine, PARAMS, [X], **OPTIONS)
    again = doubled.function({**PARAMS, "w": PARAMS["w"] * 2}, X)
    np.testing.assert_array_equal(again, doubled.function(PARAMS, X))  # the weights are those of the calibration


def test_arguments_by_keyword():
    def function(params, x, power=1, *, offset=0.0, train=False):
        assert train in (True, False)  # no array
        return (x**power) @ params["w"] + offset + train

    int8 = quantize(function, PARAMS, [X], **OPTIONS)
    assert inspect.signature(int8.function) == inspect.signature(function)
    expected = int8.function(PARAMS, X)
    np.testing.assert_array_equal(int8.function(params=PARAMS, x=X), expected)
    found = int8.function(PARAMS, x=X, power=1, offset=np.float32(2), train=True)
    np.testing.assert_allclose(found, expected + 3, rtol=1e-4)
    with pytest.raises(TypeError, match="missing a required argument: 'x'"):
        int8.function(PARAMS)


def test_convolutions_in_any_layout_and_with_groups():
    rng = np.random.default_rng(1)
    image = rng.standard_normal((2, 9, 9, 4)).astype(np.float32)
    kernel = rng.standard_normal((3, 3, 2, 6)).astype(np.float32) * np.geomspace(0.01, 10, 6).astype(np.float32)

    def function(params, x):
        x = lax.conv_general_dilated(
            x, params["k"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
        )
        turned = params["k"].transpose(3, 2, 0, 1)
        return lax.conv_general_dilated(x.transpose(0, 3, 1, 2)[:, :2], turned, (1, 1), [(1, 1), (1, 1)])

    int8 = quantize(function, {"k": kernel}, [image], **OPTIONS)
    exact, found = function({"k": kernel}, image), int8.function({"k": kernel}, image)
    for channel in range(6):  # a scale of its own
        assert sqnr_db(exact[:, channel], found[:, channel]) > 30
    assert s8_products(int8.function, {"k": kernel}, image) == {"convolution": 2}


def test_weights_on_the_left_and_with_several_channel_axes():
    rng = np.random.default_rng(2)
    heads = rng.standard_normal((16, 2, 5)).astype(np.float32)
    left = rng.standard_normal((7, 16)).astype(np.float32)
    params = {"heads": heads, "left": left, "experts": rng.standard_normal((3, 7, 4)).astype(np.float32)}

    def function(params, x):
        a = jnp.einsum("bi,ihk->bhk", x, params["heads"])
        b = params["left"] @ x.T
        return (
            a,
            b,
            jnp.einsum("ib,eio->ebo", b, params["experts"]),
            jnp.einsum("ebo,eio->ebi", jnp.ones((3, 64, 4)) * x[0, 0], params["experts"]),
        )

    int8 = quantize(function, params, [X], **OPTIONS)
    for exact, found in zip(function(params, X), int8.function(params, X), strict=True):
        assert exact.shape == found.shape
        assert sqnr_db(exact, found) > 30
    assert [len(scales) for scales in int8.weight_scales.values()] == [10, 7, 12, 21]


def test_dead_channels_become_zero():
    weight = PARAMS["w"] * np.array([1, 0, 1e-6, 1, 1, 1, 1, 1], np.float32)
    int8 = quantize(affine, {**PARAMS, "w": weight}, [X], dead_channel=1e-4, **OPTIONS)
    np.testing.assert_array_equal(int8.function({**PARAMS, "w": weight}, X)[:, 1:3], 1)
    assert (int8.weight_scales["w"][1:3] == 0).all()


def test_bfloat16_stays_bfloat16():
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), PARAMS)
    x = jnp.asarray(X, jnp.bfloat16)
    int8 = quantize(affine, params, [x], **OPTIONS)
    found = int8.function(params, x)
    assert found.dtype == jnp.bfloat16
    assert sqnr_db(affine(PARAMS, X), found.astype(np.float32)) > 30


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_strict_promotion_is_respected(dtype):
    params = {"w": PARAMS["w"][:, :1], "k": np.ones((3, 1, 1), np.float32) / 3}

    def function(params, x):
        w, k = (params[name].astype(dtype) for name in ("w", "k"))
        x = x.astype(dtype)
        return lax.conv_general_dilated((x @ w)[None], k, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    with jax.numpy_dtype_promotion("strict"):
        int8 = quantize(function, params, [X], zero_points=True, correct_bias=True, **OPTIONS)
        trained = quantize(function, params, [X], form="simulate", straight_through=True, criterion="auto")
        gradient = jax.grad(lambda params: trained.function(params, X).astype("float32").sum())(params)
        cost = sensitivity(function, params, int8.calibration, [X])[0]
    exact, found = (f(params, X).astype("float32") for f in (jax.jit(function), int8.function))
    assert sqnr_db(exact, found) > 30
    assert np.abs(gradient["w"]).max() > 0
    assert cost.alone_sqnr_db > 25


def test_gradients_pass_straight_through():
    trained = quantize(affine, PARAMS, [X], form="simulate", straight_through=True, overrides={"w": {"threshold": 1.0}})

    def loss(function):
        return lambda params, x: (function(params, x) * np.arange(8)).sum()

    expected, inputs = jax.grad(loss(affine), argnums=(0, 1))(PARAMS, X)
    found, passed = jax.grad(loss(trained.function), argnums=(0, 1))(PARAMS, X)
    np.testing.assert_allclose(found["b"], expected["b"])
    rounded = np.clip(np.round(X * 127), -127, 127).sum(axis=0) / 127
    np.testing.assert_allclose(found["w"], np.outer(rounded, np.arange(8)), rtol=1e-4, atol=1e-3)
    inside = np.abs(X) <= 127.5 / 127
    assert 0 < inside.mean() < 1
    np.testing.assert_array_equal(passed[~inside], 0)
    np.testing.assert_allclose(passed[inside], inputs[inside], rtol=0.05, atol=0.5)
    changed = trained.function({**PARAMS, "w": PARAMS["w"] * 2}, X)
    np.testing.assert_allclose(changed - 1, 2 * (trained.function(PARAMS, X) - 1), rtol=1e-4, atol=1e-4)
    plain = requantize(affine, PARAMS, X, trained.calibration, form="simulate")
    np.testing.assert_array_equal(plain.function(PARAMS, X), trained.function(PARAMS, X))


def test_requantizing_needs_no_data(in_loops):
    params, int8, _ = in_loops
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    with pytest.warns(CalibrationWarning, match="`never` stays in floating point: it was never called"):
        again = requantize(loops, params, shape, int8.calibration, criterion="max", num_bits=4, exclude="encoder*")
    assert again.skipped["encoder/block"] == "excluded by the settings"
    assert again.thresholds["first"].threshold == pytest.approx(int8.thresholds["first"].amax)
    assert again.thresholds["first"].num_bits == 4
    assert s8_products(again.function, params, X) == {"dot_general": 3}
    assert sqnr_db(loops(params, X)["out"], again.function(params, X)["out"]) < 25
    with pytest.raises(InvalidInputError, match="`first` has other weights"):
        requantize(loops, {**params, "first": params["first"] * 2}, X, int8.calibration)


def test_what_does_not_fit_stays_in_floating_point():
    wide = np.ones((140_000, 1), np.float32)
    rows = np.linspace(-1, 1, 140_000, dtype=np.float32)[None]
    with pytest.warns(CalibrationWarning, match="a sum of 140000 products may exceed INT32"):
        result = quantize(lambda params, x: x @ params["wide"], {"wide": wide}, [rows], **OPTIONS)
    assert result.thresholds == {}
    with pytest.warns(CalibrationWarning, match="`w` stays in floating point: 9 bits do not fit INT8"):
        result = quantize(affine, PARAMS, [X], num_bits=9, **OPTIONS)
    np.testing.assert_array_equal(result.function(PARAMS, X), jax.jit(affine)(PARAMS, X))
    simulated = requantize(affine, PARAMS, X, result.calibration, form="simulate", criterion="max", num_bits=9)
    assert sqnr_db(affine(PARAMS, X), simulated.function(PARAMS, X)) > 45
    with pytest.warns(CalibrationWarning, match="`w` stays in floating point: a scale is less than"):
        result = quantize(affine, PARAMS, [X * np.float32(1e-37)], **OPTIONS)
    with pytest.warns(CalibrationWarning, match="its other operand stays in floating point"):
        result = quantize(lambda params, x: x @ x.T, {}, [X], exclude="*.rhs", **OPTIONS)
    assert result.skipped.keys() == {"dot_general.lhs", "dot_general.rhs"}


def test_wrong_options_are_errors():
    with pytest.raises(InvalidInputError, match="`form` must be one of int8, simulate, got 'float'"):
        quantize(affine, PARAMS, [X], form="float")
    with pytest.raises(InvalidInputError, match="`straight_through` needs form='simulate'"):
        quantize(affine, PARAMS, [X], straight_through=True)
    with pytest.raises(InvalidInputError, match="layer `w`: weights must be finite"):
        quantize(affine, {**PARAMS, "w": PARAMS["w"] * np.nan}, [X])


def test_jitted_functions_and_x64(in_loops):
    params, int8, _ = in_loops
    np.testing.assert_allclose(
        jax.jit(int8.function)(params, X)["out"], int8.function(params, X)["out"], rtol=1e-5, atol=1e-5
    )
    with enable_x64():
        x = np.asarray(X, np.float64)
        wide = jax.tree.map(lambda w: np.asarray(w, np.float64), PARAMS)
        result = quantize(affine, wide, [x], **OPTIONS)
        found = result.function(wide, x)
        assert found.dtype == np.float64
        assert sqnr_db(x @ wide["w"] + 1, found) > 35
        expected = klquant.histogram(x, num_bins=1001, amax=result.thresholds["w"].amax)
        np.testing.assert_array_equal(result.calibration.histograms["w"].hist, expected.hist)


def test_export_runs_without_the_function():
    int8 = quantize(affine, PARAMS, [X], **OPTIONS)
    [rows] = jax.export.symbolic_shape("rows")
    exported = export(int8, PARAMS, jax.ShapeDtypeStruct((rows, 16), np.float32))
    pytest.importorskip("flatbuffers")
    loaded = jax.export.deserialize(exported.serialize())
    for number in (3, 64):
        np.testing.assert_allclose(loaded.call(X[:number]), int8.function(PARAMS, X[:number]), rtol=1e-5, atol=1e-5)
    assert "tensor<16x8xi8>" in exported.mlir_module()
    assert "tensor<16x8xf32>" not in exported.mlir_module()  # the float weights are gone
    with pytest.raises(InvalidInputError, match="expected the result of quantize, got function"):
        export(affine, PARAMS, X)
    with pytest.raises(ModelError, match="cannot export"):
        export(int8, PARAMS, X[:, :3])


def test_results_are_records(in_loops):
    _, int8, _ = in_loops
    assert isinstance(int8, QuantizedFunction)
    assert int8.calibration.thresholds.keys() == int8.thresholds.keys()
    calibrated = calibrate(affine, PARAMS, [X])
    assert calibrated.transforms == {}
