import logging

import numpy as np
import onnx
import pytest

import klquant
from klquant.backends.onnx import equalize, prepare
from support.onnx_models import array, build, run

rng = np.random.default_rng(0)
IMAGE = "float[n, 4, 8, 8] x"
X = rng.normal(size=(2, 4, 8, 8)).astype(np.float32)


def uneven(*shape):
    """Return weights whose output channels have very different ranges."""
    spread = np.exp(rng.normal(size=shape[0]) * 2).reshape(-1, *[1] * (len(shape) - 1))
    return (rng.normal(size=shape) * spread).astype(np.float32)


def network(body, inputs=IMAGE, outputs="float y", **others):
    constants = {
        "w": uneven(8, 4, 3, 3),
        "b": uneven(8),
        "v": uneven(8, 8, 1, 1),
        "d": uneven(8, 1, 3, 3),
        "c": uneven(8, 1, 1),
    }
    return build(
        inputs, outputs, body, **{name: value for name, value in {**constants, **others}.items() if name in body}
    )


def scaled(model):
    """Return the names of the constants that equalize changes; the outputs must stay the same bits."""
    prepared, equalized = prepare(model).model, equalize(model)
    feeds = {"x": X}
    for name, value in run(equalized, **feeds).items():
        np.testing.assert_array_equal(value, run(prepared, **feeds)[name])
    onnx.checker.check_model(equalized)
    old = {tensor.name: tensor for tensor in prepared.graph.initializer}
    return {tensor.name for tensor in equalized.graph.initializer if tensor != old.get(tensor.name)}


@pytest.mark.parametrize(
    ("body", "changed"),
    [
        ("a = Conv(x, w, b) y = Conv(a, v)", {"w", "b", "v"}),
        ("a = Conv(x, w, b) r = Relu(a) y = Conv(r, v)", {"w", "b", "v"}),
        ("a = Conv(x, w) u = Add(c, a) r = LeakyRelu<alpha = 0.1>(u) y = Conv(r, v)", {"w", "c", "v"}),
        ("a = Conv(x, w) r = PRelu(a, c) o = MaxPool<kernel_shape = [2, 2]>(r) y = Conv(o, v)", {"w", "v"}),
        ("a = Conv(x, w) o = AveragePool<kernel_shape = [2, 2]>(a) y = ConvTranspose(o, v)", {"w", "v"}),
        ("a = Conv(x, w) r = Relu(a) y = Conv<group = 8>(r, d)", {"w", "d"}),  # depthwise
        ("a = Conv(x, w) e = Conv<group = 8>(a, d) r = Relu(e) y = Conv(r, v)", {"w", "d", "v"}),
        ("a = ConvTranspose<group = 2>(x, t) y = Conv(a, k)", {"t", "k"}),
        ("a = Conv(x, w) p = GlobalAveragePool(a) f = Flatten(p) y = Gemm(f, g)", {"w", "g"}),
        ("a = Conv(x, w) f = Flatten(a) y = Gemm<transB = 1>(f, h)", {"w", "h"}),
        ("a = Conv(x, w) f = Reshape(a, s) y = MatMul(f, m)", {"w", "m"}),
        ("f = Flatten(x) p = MatMul(f, q) z = Relu(p) y = MatMul(z, g)", {"q", "g"}),
        ("f = Flatten(x) p = Gemm(f, q, b) z = Relu(p) y = Gemm<transB = 1>(z, v2)", {"q", "b", "v2"}),
        # what forbids it
        ("a = Conv(x, w) r = Sigmoid(a) y = Conv(r, v)", set()),
        ("a = Conv(x, w) r = Clip(a, zero, six) y = Conv(r, v)", set()),
        ("a = Conv(x, w) r = Relu(a) o = Conv(r, v) y = Add(o, r)", set()),
        ("a = Conv(x, w) r = PRelu(a, a) y = Conv(r, v)", set()),
        ("a = Conv(x, w) r = Add(a, row) y = Conv(r, v)", set()),
        ("a = Conv(x, w) f = Flatten<axis = 2>(a) y = MatMul(f, m36)", set()),
        ("a = Conv(x, w) y = MatMul(a, m6)", set()),  # of which the channels are another axis
    ],
)  # fmt: skip
def test_which_pairs_are_equalized(body, changed):
    others = {
        "t": uneven(4, 3, 3, 3), "k": uneven(2, 6, 1, 1), "g": uneven(8, 3), "h": uneven(3, 288), "m": uneven(288, 3),
        "q": uneven(256, 8), "v2": uneven(3, 8), "row": uneven(6), "m36": uneven(36, 3), "m6": uneven(6, 3),
        "zero": np.float32(0), "six": np.float32(6), "s": np.array([0, -1]),
    }  # fmt: skip
    assert scaled(network(body, **others)) == changed


def test_ranges_are_equal_afterwards():
    model = network("a = Conv(x, w, b) r = Relu(a) y = Conv(r, v)")
    equalized = equalize(model)
    first = np.abs(array(equalized, "w")).max((1, 2, 3))
    second = np.abs(array(equalized, "v")).max((0, 2, 3))
    assert (np.abs(np.log2(first / second)) <= 1).all()
    before = np.abs(array(model, "w")).max((1, 2, 3)) / np.abs(array(model, "v")).max((0, 2, 3))
    assert np.abs(np.log2(before)).max() > 2


def test_an_output_and_what_a_branch_reads_are_left_alone():
    assert scaled(network("a = Conv(x, w) y = Conv(a, v)", outputs="float y, float a")) == set()
    body = """a = Conv(x, w) y = Conv(a, v) k = ReduceSum<keepdims = 0>(x) c1 = Greater(k, zero)
              z = If (c1) <then_branch = one () => (float[n, i, j, l] t) { t = Identity(a) },
                           else_branch = two () => (float[n, i, j, l] e) { e = Identity(x) }>"""
    assert scaled(network(body, outputs="float y, float z", zero=np.float32(0))) == set()


def test_weights_in_use_elsewhere_serve_there_as_they_were():
    body = "a = Conv(x, w) r = Relu(a) y = Conv(r, v) e = Conv(x, w) z = Sigmoid(e)"
    assert "w" not in scaled(network(body, outputs="float y, float z"))


def test_channels_of_zeros_and_half_precision(caplog):
    w, v = uneven(8, 4, 3, 3), uneven(8, 8, 1, 1)
    w[:2], v[:, 3] = 0, 0
    half = {"w": w.astype(np.float16), "v": v.astype(np.float16)}
    model = build("float16[n, 4, 8, 8] x", "float16 y", "a = Conv(x, w) r = Relu(a) y = Conv(r, v)", opset=19, **half)
    with caplog.at_level(logging.INFO, "klquant"):
        equalized = equalize(prepare(model))
    assert "1 of 1 pairs of layers equalized" in caplog.text
    assert array(equalized, "w").dtype == np.float16
    np.testing.assert_array_equal(array(equalized, "w")[[0, 1, 3]], half["w"][[0, 1, 3]])
    x = X.astype(np.float16)
    np.testing.assert_allclose(run(equalized, x=x)["y"], run(model, x=x)["y"], rtol=1e-2, atol=1e-2)


def test_an_invalid_model_is_refused():
    with pytest.raises(klquant.InvalidInputError, match="`model` must be an onnx"):
        equalize(3)
