import warnings

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import klquant
from klquant.backends.calibration import Calibration
from klquant.backends.onnx import calibrate, inspect, quantizable_tensors, quantize
from klquant.backends.onnx.verification import verify
from klquant.backends.settings import Settings
from klquant.backends.thresholds import LayerThreshold
from support import onnx_networks
from support.onnx_models import array, build, run, run_all

NETWORKS = ("VGG", "residual net", "MobileNetV2")
IMAGE = "float[n, 3, 8, 8] x"
X = np.random.default_rng(1).normal(size=(2, 3, 8, 8)).astype(np.float32)


def small():
    body = "a = Conv(x, w, b) r = Relu(a) y = Conv(r, v)"
    return build(IMAGE, "float y", body, w=(4, 3, 3, 3), b=(4,), v=(2, 4, 3, 3))


THRESHOLDS = {"x": 3.0, "a": 20.0, "r": 20.0, "y": 100.0}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    """Return name, float model and calibration of a digits network."""
    model = onnx_networks.load(request.param)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", klquant.CalibrationWarning)  # KL clips some tensors hard: tests/accuracy.py
        return request.param, model, calibrate(model, onnx_networks.digits()[0])


@pytest.mark.parametrize("engine", ["tensorrt", "onnxruntime", "openvino"])
def test_networks_stay_as_accurate(network, engine):
    _, model, calibration = network
    _, images, labels = onnx_networks.digits()
    found = quantize(model, calibration, engine=engine)
    assert not found.skipped

    def accuracy(model):
        return 100 * (run(model, images=images)["logits"].argmax(1) == labels).mean()

    assert accuracy(found.model) >= accuracy(model) - 0.4


def test_signed_engines_use_int8_with_zero_point_0(network):
    _, model, calibration = network
    found = quantize(model, calibration)
    for name, threshold in found.thresholds.items():
        assert array(found.model, f"{name}_zero_point") == 0
        assert array(found.model, f"{name}_zero_point").dtype == np.int8
        assert array(found.model, f"{name}_scale") == np.float32(threshold / 127)


def test_openvino_uses_the_half_that_rectified_tensors_leave():
    found = quantize(small(), THRESHOLDS, engine="openvino")
    assert array(found.model, "r_zero_point").dtype == np.uint8
    assert array(found.model, "r_scale") == np.float32(20 / 255)
    assert array(found.model, "x_zero_point").dtype == np.int8


def test_biases_become_integers_for_onnxruntime_only():
    assert array(quantize(small(), THRESHOLDS, engine="onnxruntime").model, "b_quantized").dtype == np.int32
    assert array(quantize(small(), THRESHOLDS).model, "b").dtype == np.float32


def test_reduced_range_bounds_weights_by_63():
    found = quantize(small(), THRESHOLDS, engine="onnxruntime", reduce_range=True)
    assert np.abs(array(found.model, "w_quantized")).max() == 63


def test_values_outside_are_clipped_at_the_threshold():
    found = run_all(quantize(small(), THRESHOLDS | {"x": 1.0}).model, x=X)
    assert found["x_quantized"].min() == -128
    assert found["x_quantized"].max() == 127
    assert np.abs(found["x_dequantized"][np.abs(X) < 1] - X[np.abs(X) < 1]).max() <= 0.5 / 127 * (1 + 1e-5)


def test_skipped_layers_are_listed_and_warned_of():
    with pytest.warns(klquant.CalibrationWarning, match="in floating point: no threshold is known for its input `r`"):
        found = quantize(small(), {"x": 3.0})
    assert list(found.skipped.values()) == ["no threshold is known for its input `r`"]


@pytest.mark.parametrize("exclude", ["net/block[0]/fc", "net/*", "Gemm", "net/block[[]0]/fc"])
def test_a_name_with_brackets_excludes_itself_and_patterns_still_work(exclude):
    """Exported models have names such as `net/block[0]/fc`, which as a pattern matches `net/block0/fc`."""
    model = build("float[n, 4] x", "float y", "a = Gemm(x, w) y = Gemm(a, v)", w=(4, 4), v=(4, 4))
    for node, name in zip(model.graph.node, ("net/block[0]/fc", "net/block0/fc"), strict=True):
        node.name = name
    found = quantize(model, {"x": 1.0, "a": 1.0, "y": 1.0}, exclude=exclude)
    everything = exclude in ("net/*", "Gemm")
    assert set(found.skipped) == {"net/block[0]/fc", *(["net/block0/fc"] if everything else [])}


def test_excluded_layers_are_listed_and_not_warned_of():
    found = quantize(small(), THRESHOLDS, exclude="r")
    assert list(found.skipped.values()) == ["excluded by the settings"]


def test_layers_excluded_from_calibration_are_not_warned_of():
    calibration = calibrate(small(), [X], exclude="r", criterion="max")
    assert list(quantize(small(), calibration).skipped.values()) == ["excluded by the settings"]


def test_a_model_without_layers_is_warned_of():
    with pytest.warns(klquant.CalibrationWarning, match="no operator that can be quantized"):
        quantize(build(IMAGE, "float y", "y = Exp(x)"), {"x": 1.0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "tensorflow"}, "`engine` must be one of tensorrt, onnxruntime, openvino, got 'tensorflow'"),
        ({"exclude": ["Conv", "rr"]}, "pattern `rr` matches no node, tensor or operator"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(klquant.InvalidInputError, match=message):
        quantize(small(), THRESHOLDS, **options)


@pytest.mark.parametrize(
    ("engine", "expected"), [("tensorrt", ["x", "r"]), ("onnxruntime", ["x", "r", "y"]), ("openvino", ["x", "r"])]
)
def test_quantizable_tensors_are_those_that_get_quantized(engine, expected):
    assert quantizable_tensors(small(), engine) == expected
    assert list(quantize(small(), THRESHOLDS, engine=engine).thresholds) == expected


def test_quantizable_tensors_of_an_unknown_engine_are_refused():
    with pytest.raises(klquant.InvalidInputError, match=r"`engine` must be one of .*, got 'tensorflow'"):
        quantizable_tensors(small(), "tensorflow")


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_a_bad_threshold_is_named(value):
    with pytest.raises(klquant.InvalidInputError, match="the threshold of `r` must be positive and finite"):
        quantize(small(), THRESHOLDS | {"r": value})


def test_no_thresholds_are_refused():
    with pytest.raises(klquant.InvalidInputError, match="expected thresholds, got none"):
        quantize(small(), Calibration.of(Settings()))


def test_the_path_of_a_calibration_is_refused():
    with pytest.raises(klquant.InvalidInputError, match=r"expected a Calibration, got str; Calibration\.load\(path\)"):
        quantize(small(), "calib.npz")


def test_only_8_bits_are_written():
    four = LayerThreshold(3.0, 3.0, 0.1, 0.0, num_bits=4)
    calibration = Calibration.of(Settings())._replace(thresholds={"x": four})
    with pytest.raises(klquant.InvalidInputError, match="tensor `x` must be calibrated for 8 bits, got 4"):
        quantize(small(), calibration)


def test_a_calibration_of_another_model_is_refused(network):
    _, _, calibration = network
    with pytest.raises(klquant.InvalidInputError, match="the calibration must belong to this model"):
        quantize(small(), calibration)


def test_half_precision_needs_a_newer_opset():
    half = {"w": np.ones((3, 3, 1, 1), np.float16)}
    model = build("float16[n, 3, 8, 8] x", "float16 y", "y = Conv(x, w)", opset=17, **half)
    with pytest.raises(klquant.InvalidInputError, match="float16 need opset 19"):
        quantize(model, {"x": 1.0})
    newer = build("float16[n, 3, 8, 8] x", "float16 y", "y = Conv(x, w)", opset=19, **half)
    assert array(quantize(newer, {"x": 1.0}).model, "x_scale").dtype == np.float16


def test_a_saved_model_is_the_model(tmp_path):
    found = quantize(small(), THRESHOLDS)
    found.save(tmp_path / "int8.onnx")
    np.testing.assert_array_equal(
        run(onnx.load(tmp_path / "int8.onnx"), x=X)["y"], run(found.model, x=X)["y"]
    )  # fmt: skip


def test_a_model_is_read_from_a_path(tmp_path):
    onnx.save(small(), tmp_path / "float.onnx")
    assert quantize(tmp_path / "float.onnx", THRESHOLDS).thresholds == {"x": 3.0, "r": 20.0}


def test_models_of_all_engines_are_valid(network):
    _, model, calibration = network
    for engine in ("tensorrt", "onnxruntime", "openvino"):
        written = quantize(model, calibration, engine=engine).model
        onnx.checker.check_model(written, full_check=True)
        types = {TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32, TensorProto.FLOAT, TensorProto.INT64}
        assert {tensor.data_type for tensor in written.graph.initializer} <= types


def test_a_residual_sum_in_floating_point_reads_what_is_not_rounded():
    """The quantizer of a normalization serves the product behind it, not the sum that passes it on."""
    body = "n = LayerNormalization(x, g) f = MatMul(n, w) b = Add(f, g) r = Mul(b, small) y = Add(n, r)"
    model = build("float[n, 4, 8] x", "float[n, 4, 8] y", body, g=(8,), w=(8, 8), small=np.float32(0.01))
    x = np.random.default_rng(0).normal(size=(16, 4, 8)).astype(np.float32)
    quantized = quantize(model, calibrate(model, [x], criterion="max"), engine="onnxruntime").model
    assert [report.op_type for report in inspect(quantized, "onnxruntime") if report.int8] == ["MatMul"]
    exact, got = run(model, x=x)["y"], run(quantized, optimize=True, x=x)["y"]
    assert 10 * np.log10((exact**2).sum() / ((got - exact) ** 2).sum()) > 60
    assert not verify(quantized, [x], "onnxruntime").wrong
