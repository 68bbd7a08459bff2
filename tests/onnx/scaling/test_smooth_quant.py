import logging

import numpy as np
import onnx
import pytest

import klquant
from klquant.backends.onnx import calibrate, prepare, quantize, smooth
from support.onnx_models import array, build, run

rng = np.random.default_rng(0)
UNEVEN = np.exp(rng.normal(size=16) * 2).astype(np.float32)  # channels of very different ranges
DATA = [rng.normal(size=(4, 6, 16)).astype(np.float32) for _ in range(3)]
X = "float[n, 6, 16] x"
CONSTANTS = {"g": UNEVEN, "e": (16,), "w": (16, 8), "v": (16, 8), "u": (8, 16), "d": UNEVEN, "row": (6, 1)}
NORM = "n = LayerNormalization(x, g, e)"


def network(body, outputs="float y", **options):
    return build(X, outputs, body, **{**CONSTANTS, **options})


def sqnr(model, int8, x=DATA[0]):
    exact, found = (run(one, x=x)["y"] for one in (model, int8))
    return 10 * np.log10(np.square(exact).sum() / np.square(exact - found).sum())


def quantized(model, data=DATA):
    return quantize(model, calibrate(model, data, criterion="max"), engine="onnxruntime").model


def operators(model):
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize(
    "body",
    [
        f"{NORM} y = MatMul(n, w)",
        "n = LayerNormalization(x, g) y = MatMul(n, w)",
        f"{NORM} p = MatMul(n, w) q = MatMul(n, v) y = Add(p, q)",
        "a = Mul(x, g) b = Add(e, a) r = Relu(b) y = MatMul(r, w)",
        "a = Div(x, g) y = MatMul(a, w)",
        f"{NORM} m = MatMul(n, w) k = MatMul(m, u) a = Add(k, e) z = LeakyRelu<alpha = 0.1>(a) y = MatMul(z, v)",
    ],
)
def test_constants_take_up_the_factors(body):
    model = network(body)
    smoothed = smooth(model, DATA)
    assert operators(smoothed) == operators(prepare(model).model)
    np.testing.assert_allclose(run(smoothed, x=DATA[0])["y"], run(model, x=DATA[0])["y"], rtol=1e-4, atol=1e-4)
    assert smoothed != prepare(model).model


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        (f"{NORM} p = MatMul(n, w) q = MatMul(p, u) y = Add(q, n)", "float y"),  # a residual branch
        (f"{NORM} y = MatMul(n, w)", "float y, float n"),
        ("a = Mul(x, g) s = Sigmoid(a) t = Mul(a, s) y = MatMul(t, w)", "float y"),
        ("h = Mul(x, g) y = MatMul(h, w) z = MatMul(h, row6)", "float y, float z"),
    ],
)
def test_a_node_divides_where_constants_cannot(body, outputs):
    model = network(body.replace("row6", "v2"), outputs, v2=(16, 3)) if "row6" in body else network(body, outputs)
    smoothed = smooth(model, DATA)
    expected = run(model, x=DATA[0])
    for name, value in run(smoothed, x=DATA[0]).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-4)
    onnx.checker.check_model(smoothed)
    assert len(smoothed.graph.node) - len(prepare(model).model.graph.node) == ("row6" not in body)


def test_it_is_much_more_accurate_in_int8():
    model = network(f"{NORM} p = MatMul(n, w) q = MatMul(p, u) y = Add(q, n)")
    assert sqnr(model, quantized(smooth(model, DATA))) > sqnr(model, quantized(model)) + 6


def test_the_rows_of_gemm_are_channels():
    body = "a = Mul(x, g) y = Gemm<transB = 1>(a, w, b)"
    data = [batch[:, 0] for batch in DATA]
    model = build("float[n, 16] x", "float y", body, g=UNEVEN, w=(8, 16), b=(8,))
    smoothed = smooth(model, data)
    np.testing.assert_allclose(run(smoothed, x=data[0])["y"], run(model, x=data[0])["y"], rtol=1e-4, atol=1e-4)
    assert sqnr(model, quantized(smoothed, data), data[0]) > sqnr(model, quantized(model, data), data[0]) + 3


@pytest.mark.parametrize("grouped", [True, False])
def test_a_layer_takes_up_the_factors_of_a_convolution(grouped):
    body = f"""a = Conv(x, w, b) r = Relu(a) y = Conv{"<group = 16>" if grouped else ""}(r, v)"""
    v = np.ones((16, 1, 3, 3) if grouped else (3, 16, 3, 3), np.float32)
    v += rng.normal(size=v.shape).astype(np.float32) / 10
    spread = np.exp(rng.normal(size=16) * 2).astype(np.float32)  # of the channels between: far from any order
    constants = {
        "w": rng.normal(size=(16, 4, 1, 1)) * spread.reshape(-1, 1, 1, 1),
        "b": spread,
        "v": v / spread.reshape(v.shape[0] if grouped else 1, -1, 1, 1),
    }
    constants = {name: value.astype(np.float32) for name, value in constants.items()}
    model = build("float[n, 4, 8, 8] x", "float y", body, **constants)
    data = [rng.normal(size=(2, 4, 8, 8)).astype(np.float32) for _ in range(2)]
    smoothed = smooth(model, data)
    assert operators(smoothed) == operators(prepare(model).model)
    expected = run(model, x=data[0])["y"]
    np.testing.assert_allclose(run(smoothed, x=data[0])["y"], expected, rtol=1e-4, atol=1e-4)

    def int8(float_model):
        calibration = calibrate(float_model, data, criterion="max")
        return quantize(float_model, calibration, engine="openvino").model

    assert sqnr(model, int8(smoothed), data[0]) > sqnr(model, int8(model), data[0]) + 6


def test_convolutions_can_be_left_alone():
    model = build("float[n, 4, 8, 8] x", "float y", "a = Conv(x, w) y = Conv(a, v)", w=(8, 4, 1, 1), v=(2, 8, 1, 1))
    data = [np.ones((2, 4, 8, 8), np.float32)]
    assert smooth(model, data, alpha=1.0, convolutions=False) == prepare(model).model


def test_alpha_evens_out_the_activation_or_the_weights():
    model = network(f"{NORM} y = MatMul(n, w)")
    amax = np.max(
        [np.abs(run(network(f"{NORM} y = MatMul(n, w)", "float y, float n"), x=x)["n"]).max((0, 1)) for x in DATA], 0
    )
    for alpha in (0.0, 0.5, 1.0):
        smoothed = smooth(model, DATA, alpha=alpha)
        factors = array(model, "g") / array(smoothed, "g")
        expected = amax**alpha / np.abs(array(model, "w")).max(1) ** (1 - alpha)
        np.testing.assert_allclose(factors / factors[0], expected / expected[0], rtol=1e-3)


def test_nothing_changes_where_nothing_is_uneven():
    model = network("y = MatMul(x, w)", w=np.eye(16, dtype=np.float32))
    assert smooth(model, DATA) == prepare(model).model


def test_what_a_branch_reads_keeps_its_values():
    body = f"""{NORM} p = MatMul(n, w) c = Constant<value = bool {{1}}>()
               y = If (k) <then_branch = one () => (float[a, b, 16] t) {{ t = Identity(n) }},
                           else_branch = two () => (float[a, b, 16] f) {{ f = Identity(x) }}>"""
    model = build(f"{X}, bool k", "float p, float y", body, **CONSTANTS)
    data = [{"x": x, "k": np.array(True)} for x in DATA]
    smoothed = smooth(model, data)
    expected = run(model, **data[0])
    for name, value in run(smoothed, **data[0]).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-4)


def test_a_shared_weight_serves_others_as_it_was():
    model = network(f"{NORM} p = MatMul(n, w) q = MatMul(x, w) y = Add(p, q)")
    np.testing.assert_allclose(
        run(smooth(model, DATA), x=DATA[0])["y"], run(model, x=DATA[0])["y"], rtol=1e-4, atol=1e-4
    )


def test_half_precision_stays():
    constants = {name: array(network(f"{NORM} y = MatMul(n, w)"), name).astype(np.float16) for name in "gew"}
    model = build("float16[n, 6, 16] x", "float16 y", f"{NORM} y = MatMul(n, w)", opset=19, **constants)
    data = [batch.astype(np.float16) for batch in DATA]
    smoothed = smooth(model, data)
    assert array(smoothed, "w").dtype == array(smoothed, "g").dtype == np.float16
    np.testing.assert_allclose(run(smoothed, x=data[0])["y"], run(model, x=data[0])["y"], rtol=0.02, atol=0.05)


def test_channels_of_zeros_and_a_prepared_model(caplog):
    data = [batch * (np.arange(16) > 3) for batch in DATA]
    model = network("a = Mul(x, g) y = MatMul(a, w)")
    prepared = prepare(model)
    with caplog.at_level(logging.INFO, "klquant"):
        smoothed = smooth(prepared, data)
    assert "smoothed by 2 constants and 0 nodes" in caplog.text
    np.testing.assert_array_equal(array(smoothed, "g")[:4], UNEVEN[:4])
    assert prepared.model == prepare(model).model


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (DATA, {"alpha": 1.5}, "`alpha` must be in 0 .. 1, got 1.5"),
        ([], {}, "at least one batch"),
        ([DATA[0], DATA[0] * np.nan], {}, "batch 1: values must be finite"),
        ([DATA[0][..., :3]], {}, "batch 0: input `x` must have shape"),
    ],
)
def test_bad_arguments_are_refused(data, options, message):
    with pytest.raises(klquant.InvalidInputError, match=message):
        smooth(network(f"{NORM} y = MatMul(n, w)"), data, **options)
