"""Models with zero points: more accurate where activations are one-sided, and as much of them in INT8."""

import warnings

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import klquant
from klquant.backends.onnx import calibrate, inspect, quantize, verify
from support.onnx_models import array, build, run

IMAGE = "float[n, 3, 16, 16] x"
ACTIVATIONS = {
    "SiLU": "s{0} = Sigmoid(c{0}) a{0} = Mul(c{0}, s{0})",
    "HardSwish": "a{0} = HardSwish(c{0})",
    "LeakyReLU": "a{0} = LeakyRelu<alpha=0.01>(c{0})",
    "GELU": "d{0} = Div(c{0}, root) e{0} = Erf(d{0}) o{0} = Add(e{0}, one) h{0} = Mul(c{0}, half) "
    "a{0} = Mul(h{0}, o{0})",
}
GELU = {"root": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)}


def images(seed):
    return np.random.default_rng(seed).normal(size=(16, 3, 16, 16)).astype(np.float32)


def network(activation, pads="<pads=[1,1,1,1]>"):
    """Return four convolutions with this activation between them."""
    rng, weights, body = np.random.default_rng(0), {}, ""
    for k in range(4):
        channels = 16 if k else 3
        weight = rng.normal(size=(16, channels, 3, 3)) * (2 / (9 * channels)) ** 0.5
        weights[f"w{k}"] = weight.astype(np.float32)
        body += f"c{k} = Conv{pads}({f'a{k - 1}' if k else 'x'}, w{k}) "
        body += ACTIVATIONS[activation].format(k) + " " if k < 3 else ""
    return build(IMAGE, "float c3", body, **weights, **(GELU if activation == "GELU" else {}))


def sqnr(model, quantized):
    x = images(9)
    exact, got = run(model, x=x)["c3"], run(quantized.model, optimize=True, x=x)["c3"]
    return 10 * np.log10((exact**2).sum() / ((got - exact) ** 2).sum())


def zero_points(model):
    return {
        tensor.name.removesuffix("_zero_point"): int(numpy_helper.to_array(tensor))
        for tensor in model.graph.initializer
        if tensor.name.endswith("_zero_point") and not tensor.dims
    }


@pytest.fixture(scope="module", params=ACTIVATIONS)
def calibrated(request):
    model = network(request.param)
    return model, calibrate(model, [images(0), images(1)], criterion="max")


def test_networks_with_one_sided_activations_gain(calibrated):
    model, calibration = calibrated
    plain, found = (
        quantize(model, calibration, engine="onnxruntime", asymmetric=asymmetric) for asymmetric in (False, True)
    )
    assert sqnr(model, found) > sqnr(model, plain) + 1.0
    assert set(zero_points(plain.model).values()) <= {0, 128}
    assert 0 < zero_points(found.model)["a0"] < 50
    low, high = found.ranges["a0"]
    assert low < 0 < 3 * -low < high


def test_as_much_of_them_runs_in_int8_and_computes_what_is_written(calibrated):
    model, calibration = calibrated
    plain, found = (
        quantize(model, calibration, engine="onnxruntime", asymmetric=asymmetric).model for asymmetric in (False, True)
    )
    before, after = ([(node.name, node.int8) for node in inspect(one, "onnxruntime")] for one in (plain, found))
    assert before == after
    assert not verify(found, [images(9)], "onnxruntime").wrong


@pytest.mark.parametrize("activation", ["SiLU", "LeakyReLU"])
def test_openvino_has_zero_points_at_convolutions_without_padding(activation):
    model = network(activation, pads="")
    calibration = calibrate(model, [images(0), images(1)], criterion="mse")
    found = quantize(model, calibration, engine="openvino")
    assert 0 < zero_points(found.model)["a0"] < 50
    assert sqnr(model, found) > sqnr(model, quantize(model, calibration, engine="openvino", asymmetric=False)) + 1.0
    assert all(node.int8 for node in inspect(found.model, "openvino") if node.op_type == "Conv")
    assert not verify(found.model, [images(9)], "openvino").wrong


def test_openvino_has_none_at_convolutions_with_padding(calibrated):
    model, calibration = calibrated
    assert set(zero_points(quantize(model, calibration, engine="openvino").model).values()) == {0}


def test_values_that_were_never_negative_have_zero_point_0():
    model = build(IMAGE, "float y", "y = Conv(x, w)", w=(4, 3, 3, 3))
    calibration = calibrate(model, [np.abs(images(0))], criterion="max")
    for engine in ("onnxruntime", "openvino"):
        found = quantize(model, calibration, engine=engine)
        assert found.ranges["x"] == pytest.approx((0, calibration.amax["x"]))
        assert array(found.model, "x_scale") == np.float32(calibration.amax["x"] / 255)


def test_tensorrt_stays_symmetric(calibrated):
    model, calibration = calibrated
    ours, plain = (quantize(model, calibration, asymmetric=asymmetric).model for asymmetric in (True, False))
    assert ours.SerializeToString() == plain.SerializeToString()


def test_thresholds_without_ranges_stay_symmetric(calibrated):
    model, calibration = calibrated
    plain = quantize(model, calibration, engine="onnxruntime", asymmetric=False).model.SerializeToString()
    older = calibration._replace(ranges={})
    given = {name: found.threshold for name, found in calibration.thresholds.items()}
    for source in (older, given):
        assert quantize(model, source, engine="onnxruntime").model.SerializeToString() == plain


def test_a_given_threshold_is_symmetric():
    model = network("LeakyReLU")
    calibration = calibrate(model, [images(0)], criterion="max", overrides={"a0": {"threshold": 2.0}})
    found = quantize(model, calibration, engine="onnxruntime")
    assert zero_points(found.model)["a0"] == 128
    assert zero_points(found.model)["a1"] < 50


def test_the_table_shows_the_ranges(calibrated):
    model, calibration = calibrated
    found = quantize(model, calibration, engine="onnxruntime")
    html = found._repr_html_()
    assert f"{found.ranges['a0'].low:.4g}" in html
    assert ">low<" in html


BEFORE = "c = Conv<pads=[1,1,1,1]>(x, w, b) a = LeakyRelu<alpha=0.1>(c) "
OTHER = "d = Conv<pads=[1,1,1,1]>(a, v) e = LeakyRelu<alpha=0.2>(d) "
OPERATORS = {
    "padded": "y = Conv<pads=[1,1,1,1]>(a, v)",
    "depthwise": "y = Conv<pads=[1,1,1,1], group=4>(a, g)",
    "MaxPool": "p = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(a) y = Conv(p, v)",
    "AveragePool": "p = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(a) y = Conv(p, v)",
    "counted padding": "p = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(a) y = Conv(p, v)",
    "Gemm": "p = GlobalAveragePool(a) f = Flatten(p) h = Gemm(f, m, n) l = LeakyRelu<alpha=0.1>(h) y = Gemm(l, o)",
    "Add": OTHER + "s = Add(a, e) y = Conv(s, v)",
    "Mul": OTHER + "s = Mul(a, e) y = Conv(s, v)",
    "rectified": "d = Conv<pads=[1,1,1,1]>(a, v) s = Add(a, d) r = Relu(s) y = Conv(r, v)",
    "Sigmoid": "s = Sigmoid(a) t = Mul(a, s) y = Conv(t, v)",
    "Concat": OTHER + "r = Relu(e) s = Concat<axis=1>(a, r) y = Conv(s, u)",
    "MatMul": "p = MatMul(a, k) l = LeakyRelu<alpha=0.1>(p) y = MatMul(l, k)",
    "two factors": "p = MatMul(a, k) l = LeakyRelu<alpha=0.1>(p) y = MatMul(a, l)",
    "Transpose": "t = Transpose<perm=[0,1,3,2]>(a) y = Conv(t, v)",
    "Clip": "d = Conv(a, v) t = Clip(d, zero, six) y = Conv(t, v)",
}
CONSTANTS = {
    **{"w": (4, 3, 3, 3), "b": (4,), "v": (4, 4, 3, 3), "g": (4, 1, 3, 3), "u": (4, 8, 3, 3), "k": (16, 16)},
    **{"m": (4, 8), "n": (8,), "o": (8, 4), "zero": np.float32(0), "six": np.float32(6)},
}


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("body", OPERATORS.values(), ids=OPERATORS.keys())
def test_every_kernel_takes_zero_points(body, engine):
    body = BEFORE + body
    used = {name: value for name, value in CONSTANTS.items() if f", {name})" in body or f", {name}," in body}
    model = build(IMAGE, "float y", body, **used)
    calibration = calibrate(model, [images(0)], criterion="max")
    plain, found = (
        quantize(model, calibration, engine=engine, asymmetric=asymmetric).model for asymmetric in (False, True)
    )
    assert not verify(found, [images(0)], engine).wrong
    before, after = ([(node.name, node.int8) for node in inspect(one, engine)] for one in (plain, found))
    assert before == after
    if engine == "onnxruntime":
        assert zero_points(found)["a"] not in (0, 128)


def test_the_default_criterion_gains_too():
    model = network("SiLU")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", klquant.CalibrationWarning)
        calibration = calibrate(model, [images(0), images(1)])
    found = [quantize(model, calibration, engine="onnxruntime", asymmetric=one) for one in (False, True)]
    assert sqnr(model, found[1]) > sqnr(model, found[0])
    onnx.checker.check_model(found[1].model, full_check=True)


@pytest.mark.parametrize("criterion", ["entropy", "max"])
def test_before_silu_levels_go_to_values_that_silu_does_not_make_alike(criterion):
    model = network("SiLU")
    lowered = build(IMAGE, "float c", "c = Conv(x, w, b)", w=array(model, "w0"), b=np.full(16, -4, np.float32))
    shifted = onnx.ModelProto()
    shifted.CopyFrom(model)
    shifted.graph.initializer.append(numpy_helper.from_array(array(lowered, "b"), "b0"))
    shifted.graph.node[0].input.append("b0")
    data = [4 * images(0), 4 * images(1)]
    found = quantize(shifted, calibrate(shifted, data, criterion=criterion), engine="onnxruntime")
    seen = run(lowered, x=data[0])["c"]
    assert seen.min() < -20
    assert seen.min() / 2 < found.ranges["c0"].low < -2
    assert verify(found.model, [4 * images(9)], "onnxruntime").wrong == []
    openvino = quantize(shifted, calibrate(shifted, data, criterion=criterion), engine="openvino")
    assert "c0" not in openvino.ranges
