import numpy as np
import pytest

from klquant.backends.onnx import calibrate, prepare, quantize, verify
from klquant.backends.onnx.lowering.padding import pad_channels
from support.onnx_models import array, build, run

IMAGE = "float[n, 3, 8, 8] x"
X = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
BLOCK = """
    a = Conv(x, w1, b1) r = Relu(a)
    d = Conv<group = 24, pads = [1, 1, 1, 1]>(r, w2, b2) h = HardSwish(d)
    p = GlobalAveragePool(h) e = Conv(p, g1) k = Relu(e) f = Conv(k, g2) s = Sigmoid(f) m = Mul(h, s)
"""
CONSTANTS = {"w1": (24, 3, 1, 1), "b1": (24,), "w2": (24, 1, 3, 3), "b2": (24,), "w3": (4, 24, 1, 1),
             "g1": (6, 24, 1, 1), "g2": (24, 6, 1, 1)}  # fmt: skip


def network(body, **more):
    names = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    used = {name: value for name, value in (CONSTANTS | more).items() if name in names}
    return prepare(build(IMAGE, "float[n, 4, 8, 8] y", body, **used))


def shapes(model):
    return {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}


def test_channels_of_depthwise_convolutions_become_multiples_of_16():
    prepared = network(f"{BLOCK} y = Conv(m, w3)")
    padded = pad_channels(prepared, set())
    found = shapes(padded.model)
    assert {name: found[name] for name in CONSTANTS} == {
        "w1": (32, 3, 1, 1), "b1": (32,), "w2": (32, 1, 3, 3), "b2": (32,), "w3": (4, 32, 1, 1),
        "g1": (6, 32, 1, 1), "g2": (32, 6, 1, 1),
    }  # fmt: skip
    assert not array(padded.model, "w3")[:, 24:].any()
    np.testing.assert_allclose(run(padded.model, x=X)["y"], run(prepared.model, x=X)["y"], rtol=1e-5, atol=1e-5)


def test_the_quantized_model_gives_what_it_gave_without(monkeypatch):
    prepared = network(f"{BLOCK} y = Conv(m, w3)")
    calibration = calibrate(prepared, [X], criterion="max")
    with_zeros = quantize(prepared, calibration, engine="onnxruntime").model
    assert not verify(with_zeros, [X], "onnxruntime").wrong
    assert shapes(with_zeros)["w2_quantized"] == (32, 1, 3, 3)
    monkeypatch.setattr("klquant.backends.onnx.lowering.api.pad_channels", lambda prepared, spared: prepared)
    without = quantize(prepared, calibration, engine="onnxruntime").model
    assert shapes(without)["w2_quantized"] == (24, 1, 3, 3)
    results = (run(model, x=X, optimize=True)["y"] for model in (with_zeros, without))
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize(
    "body",
    [
        "d = Conv<group = 24, pads = [1, 1, 1, 1]>(r, w2) t = Concat<axis = 1>(d, r) y = Conv(t, w4)",
        "d = Conv<group = 24, pads = [1, 1, 1, 1]>(r, w2) q = Relu(d) t = Mul(q, scales) y = Conv(t, w3)",
        "d = Conv<group = 24, pads = [1, 1, 1, 1]>(r, w2) t = Transpose<perm = [0, 1, 3, 2]>(d) y = Conv(t, w3)",
        "d = Conv<group = 24, pads = [1, 1, 1, 1]>(r, w2) t = Div(d, r) y = Conv(t, w3)",
        "d = Conv<group = 24, pads = [1, 1, 1, 1]>(r, w2) t = Conv<group = 4>(d, w5) y = Conv(t, w3)",
        "d = Conv<group = 24, pads = [1, 1, 1, 1]>(r, w2) q = ReduceMean<axes = [1]>(d) t = Mul(d, q) y = Conv(t, w3)",
    ],
)
def test_nothing_is_padded_where_something_cannot_follow(body):
    more = {"w4": (4, 48, 1, 1), "w5": (24, 6, 1, 1), "scales": (24, 1, 1)}
    prepared = network(f"a = Conv(x, w1, b1) r = Relu(a) {body}", **more)
    assert pad_channels(prepared, set()) is prepared


def test_inputs_outputs_and_few_channels_are_not_padded():
    inner = build(
        "float[n, 24, 8, 8] x",
        "float[n, 24, 8, 8] y",
        "y = Conv<group = 24, pads = [1, 1, 1, 1]>(x, w)",
        w=(24, 1, 3, 3),
    )
    prepared = prepare(inner)
    assert pad_channels(prepared, set()) is prepared
    few = "a = Conv(x, w1) d = Conv<group = 8>(a, w2) y = Conv(d, w3)"
    prepared = network(few, w1=(8, 3, 1, 1), w2=(8, 1, 3, 3), w3=(4, 8, 1, 1))
    assert pad_channels(prepared, set()) is prepared


def test_means_over_pixels_follow():
    body = "a = Conv(x, w1) d = Conv<group = 24>(a, w2) q = ReduceMean<axes = [2, 3]>(d) t = Mul(d, q) y = Conv(t, w3)"
    prepared = network(body)
    padded = pad_channels(prepared, set())
    assert shapes(padded.model)["w2"] == (32, 1, 3, 3)
    np.testing.assert_allclose(run(padded.model, x=X)["y"], run(prepared.model, x=X)["y"], rtol=1e-5, atol=1e-5)


def test_excluded_layers_are_not_padded():
    prepared = network(f"{BLOCK} y = Conv(m, w3)")
    calibration = calibrate(prepared, [X], criterion="max")
    depthwise = next(node.name for node in prepared.graph.nodes if "w2" in node.input)
    model = quantize(prepared, calibration, engine="onnxruntime", exclude=depthwise).model
    assert shapes(model)["w2"] == (24, 1, 3, 3)
