"""SmoothQuant as a part of ``quantize``: kept where other batches confirm what it gains."""

import warnings

import numpy as np
import pytest

import klquant
from klquant.backends.onnx import calibrate, prepare, quantize
from klquant.backends.onnx.refinement import layer_choice
from klquant.backends.onnx.refinement.range_choices import smoothed_bases
from support.onnx_models import build, run

UNEVEN = np.exp(np.random.default_rng(0).normal(size=16)).astype(np.float32)  # channels of very different ranges
ALONE = "n = LayerNormalization(x, g, e) y = MatMul(n, w)"
BRANCH = "n = LayerNormalization(x, g, e) q = MatMul(n, w) r = Mul(n, i) y = Add(q, r)"  # takes a node more


def data(seed, number=4):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(4, 6, 16)).astype(np.float32) for _ in range(number)]


def network(body=ALONE, scale=UNEVEN):
    """Return a network in which all channels of `n` matter alike in what reads it."""
    weight = np.random.default_rng(1).normal(size=(16, 16)) / scale[:, None]
    constants = {"g": scale, "e": np.zeros(16), "w": weight, "i": 1 / scale}
    return build("float[n, 6, 16] x", "float y", body, **{k: v.astype(np.float32) for k, v in constants.items()})


def sqnr_db(model, quantized):
    x = np.concatenate(data(7))
    floats, found = (run(one, x=x)["y"] for one in (prepare(model).model, quantized.model))
    return 10 * np.log10((floats**2).sum() / ((floats - found) ** 2).sum())


@pytest.fixture(scope="module")
def case():
    model = network()
    return model, calibrate(model, data(0))


@pytest.mark.parametrize("body", [ALONE, BRANCH])
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "tensorrt"])
def test_channels_are_scaled_where_that_helps(engine, body):
    model = network(body)
    calibration = calibrate(model, data(0))
    options = {"engine": engine, "batches": data(0), "correct_bias": False}
    plain, found = (quantize(model, calibration, min_int8=share, **options) for share in (1.0, 0.99))
    assert not plain.smoothed
    assert found.smoothed == ("n",)
    assert "1 activation smoothed" in repr(found)
    assert sqnr_db(model, found) > sqnr_db(model, plain) + 6
    assert found.thresholds.keys() == plain.thresholds.keys()
    assert found.thresholds["n"] < plain.thresholds["n"] / 2


def test_channels_stay_where_nothing_is_uneven():
    model = network(scale=np.ones(16, np.float32))
    found = quantize(model, calibrate(model, data(0)), engine="onnxruntime", batches=data(0))
    assert not found.smoothed


@pytest.mark.parametrize("criterion", ["max", "mse"])
def test_only_amax_or_a_guarded_threshold_may_be_replaced(case, criterion):
    model, calibration = case
    thresholds = calibration.search_thresholds(criterion=criterion)
    options = {"engine": "onnxruntime", "batches": data(0), "min_int8": 0.99}
    found = quantize(model, calibration._replace(thresholds=thresholds), **options)
    assert bool(found.smoothed) == (criterion == "max")
    given = {name: layer.threshold for name, layer in thresholds.items()}
    assert not quantize(model, given, **options).smoothed


def planes(seed):
    return [np.random.default_rng(seed + k).normal(size=(2, 16, 6, 6)).astype(np.float32) for k in range(4)]


def convolutional(scale):
    """Return a depthwise convolution behind a learned affine, whose channels all matter alike."""
    constants = {"k": scale.reshape(16, 1, 1), "a": np.full(1, 2.0), "c": np.full(1, 0.1), "w": np.ones((16, 1, 3, 3))}
    body = "h = HardSwish(x) s = Mul(h, k) m = Mul(a, s) z = Add(c, m) y = Conv<group = 16>(z, w)"
    constants["w"] /= scale.reshape(16, 1, 1, 1)
    return build("float[n, 16, 6, 6] x", "float y", body, **{k: v.astype(np.float32) for k, v in constants.items()})


@pytest.mark.parametrize("worth", [0.4, 0.0])
def test_channels_between_convolutions_are_scaled_where_that_helps_much(monkeypatch, worth):
    monkeypatch.setattr(layer_choice, "SCALED", worth)
    model = convolutional(UNEVEN)
    calibration = calibrate(model, planes(0))
    found = quantize(model, calibration, engine="openvino", batches=planes(0), correct_bias=False, min_int8=0.99)
    assert found.smoothed == (("m", "z") if worth else ())
    x = planes(7)[0]
    exact, int8 = (run(one, x=x)["y"] for one in (model, found.model))
    share = np.square(exact - int8).sum() / np.square(exact).sum()
    assert (share < 1e-3) == bool(worth)


def test_channels_of_convolutions_are_a_base_of_their_own():
    prepared, feeds = prepare(convolutional(UNEVEN)), [{"x": x} for x in planes(0)]
    calibration = calibrate(prepared, planes(0))
    (found,) = smoothed_bases(prepared, calibration, "openvino", (), feeds, asymmetric=True)
    assert found.convolutions
    assert found.scaled.keys() == {"m", "z"}
    assert smoothed_bases(prepared, calibration, "openvino", ("z",), feeds, asymmetric=True) == []


@pytest.mark.parametrize("excluded", [(), ("n",), ("matmul1",), ("MatMul",)])
def test_what_is_excluded_is_not_scaled(case, excluded):
    prepared, feeds = prepare(case[0]), [{"x": x} for x in data(0)]
    assert [node.name for node in prepared.graph.nodes if node.op_type == "MatMul"] == ["matmul1"]
    found = smoothed_bases(prepared, case[1], "openvino", excluded, feeds, asymmetric=True)
    assert len(found) == (not excluded)


def test_trials_do_not_repeat_a_warning():
    rng = np.random.default_rng(0)
    bias = np.array([1e5, 0.1, -0.2, 0.3], np.float32)
    weight = rng.normal(size=(16, 4), scale=1e-3).astype(np.float32)
    model = build("float[n, 16] x", "float y", "y = Gemm(x, w, b)", w=weight, b=bias)
    batches = [rng.normal(size=(8, 16), scale=1e-3).astype(np.float32) for _ in range(2)]
    with pytest.warns(klquant.CalibrationWarning, match="is an outlier"):
        calibration = calibrate(model, batches)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        quantize(model, calibration, engine="onnxruntime", batches=batches)
    assert sum("make weights coarser" in str(one.message) for one in found) == 1
