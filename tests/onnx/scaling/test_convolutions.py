import numpy as np
import pytest

from klquant.backends.onnx import calibrate, prepare, quantize, smooth
from klquant.backends.onnx.scaling.convolutions import find_convolutions
from support.onnx_models import array, build, run

rng = np.random.default_rng(0)
X = "float[n, 8, 6, 6] x"
SPREAD = np.exp(rng.normal(size=8) * 2).astype(np.float32)  # channels of very different ranges
PLANES = SPREAD.reshape(8, 1, 1)
CONSTANTS = {"a": np.float32(1.5), "c": np.full((1,), 0.3, np.float32), "p": PLANES, "q": PLANES[None] / 7}
CONSTANTS |= {"w": (5, 8, 3, 3), "v": (8, 8, 1, 1), "b": (8,), "d": (8, 1, 3, 3), "t": (8, 4, 2, 2), "s": (8, 5, 1, 1)}
DATA = [(rng.normal(size=(2, 8, 6, 6)) * PLANES).astype(np.float32) for _ in range(2)]
AFFINE = "h = HardSwish(x) m = Mul(h, a) z = Add(m, c)"
CONV = "y = Conv(z, w)"


def network(body, outputs="float y"):
    names = {word.strip("(),") for word in body.split()}
    used = {name: value for name, value in CONSTANTS.items() if name in names or f"({name}" in body}
    return build(X, outputs, body, **used)


def found(body, outputs="float y"):
    return [set(one.tensors) for one in find_convolutions(prepare(network(body, outputs)).graph)]


SCALED = {
    "a factor and a summand for all channels": (f"{AFFINE} {CONV}", [{"m", "z"}]),
    "for each channel": (f"h = HardSwish(x) m = Mul(p, h) z = Add(q, m) {CONV}", [{"m", "z"}]),
    "depthwise": (f"{AFFINE} y = Conv<group = 8, pads = [1, 1, 1, 1]>(z, d)", [{"m", "z"}]),
    "two readers": (f"{AFFINE} {CONV} o = Conv(z, v)", [{"m", "z"}]),
    "a convolution, and a factor behind it": ("k = Conv(x, v, b) m = Mul(c, k) y = Add(m, c)", [{"k"}]),
    "two convolutions": (
        "k = Conv(x, v, b) r = Relu(k) g = AveragePool<kernel_shape = [2, 2]>(r) y = Conv(g, w)",
        [{"k", "r", "g"}],
    ),
    "a factor by itself on the way": (f"k = Conv(x, v) z = Mul(c, k) {CONV}", [{"k", "z"}]),
    "transposed": ("k = ConvTranspose<group = 2>(x, t) y = Conv(k, w)", [{"k"}]),
    "transposed behind": ("k = Conv(x, v) y = ConvTranspose(k, s)", [{"k"}]),
    "squeeze and excitation": (
        f"{AFFINE} g = GlobalAveragePool(z) k = Conv(g, v) e = Sigmoid(k) u = Mul(z, e) y = Conv(u, w)",
        [{"m", "z", "g", "u"}],
    ),
}
LEFT_ALONE = {
    "a residual branch": (f"{AFFINE} {CONV} o = Add(z, x)", "float y, float o"),
    "an output": (f"{AFFINE} {CONV}", "float y, float z"),
    "a sigmoid": (f"{AFFINE.replace('z =', 'f =')} z = Sigmoid(f) {CONV}", "float y"),
    "a factor that may be part of a function": (f"e = Erf(x) h = Mul(x, e) z = Mul(h, a) {CONV}", "float y"),
    "a square": (f"{AFFINE.replace('z =', 'f =')} r = Relu(f) z = Mul(f, r) {CONV}", "float y"),
    "a product with itself": (f"{AFFINE.replace('z =', 'f =')} z = Mul(f, f) {CONV}", "float y"),
}


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("alpha", [None, 1.0])
def test_the_function_stays(name, alpha):
    body, tensors = SCALED[name]
    outputs = "float y, float o" if " o = " in body else "float y"
    assert found(body, outputs) == tensors
    model = prepare(network(body, outputs)).model
    smoothed = smooth(model, DATA, alpha=alpha)
    assert [node.op_type for node in smoothed.graph.node] == [node.op_type for node in model.graph.node]
    assert smoothed != model or alpha is None
    wanted = run(model, x=DATA[0])
    for key, value in run(smoothed, x=DATA[0]).items():
        np.testing.assert_allclose(value, wanted[key], rtol=1e-3, atol=1e-4 * np.abs(wanted[key]).max())


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_nothing_is_scaled_where_something_else_depends_on_it(name):
    body, outputs = LEFT_ALONE[name]
    assert found(body, outputs) == []


@pytest.mark.parametrize("shape", [(8, 6, 6), (2, 8, 1, 1), (6,), (1, 8, 1, 1)])
def test_constants_with_more_values_are_left_alone(shape):
    body = f"m = Mul(x, p) z = Add(m, e) {CONV}"
    model = build("float[2, 8, 6, 6] x", "float y", body, p=PLANES, e=shape, w=(5, 8, 3, 3))
    assert len(find_convolutions(prepare(model).graph)) == (shape == (1, 8, 1, 1))


def test_a_tensor_is_scaled_only_once():
    body = f"{AFFINE} g = GlobalAveragePool(z) k = Conv(g, v) u = Mul(z, k) y = Conv(u, w)"
    assert found(body) == [{"m", "z", "g", "u"}]


def test_the_channels_of_an_activation_get_equal_ranges():
    smoothed = smooth(network(f"{AFFINE} y = Conv<group = 8>(z, d)"), DATA, alpha=1.0)
    assert array(smoothed, "a").shape == (8, 1, 1)
    assert array(smoothed, "c").shape == (8, 1, 1)
    widened = build(X, "float z", AFFINE, a=array(smoothed, "a"), c=array(smoothed, "c"))
    largest = np.abs(np.concatenate([run(widened, x=x)["z"] for x in DATA])).max((0, 2, 3))
    np.testing.assert_allclose(largest, largest[0], rtol=1e-5)


def test_int8_is_much_more_accurate():
    model = network(f"{AFFINE} y = Conv<group = 8>(z, d)")
    exact = run(model, x=DATA[0])["y"]

    def noise(float_model):
        int8 = quantize(float_model, calibrate(float_model, DATA, criterion="max"), engine="openvino").model
        return np.square((run(int8, x=DATA[0])["y"] - exact) / exact.std((0, 2, 3), keepdims=True)).sum()

    assert noise(smooth(model, DATA)) < noise(model) / 20


def test_a_channel_may_become_twice_as_large():
    smoothed = smooth(network(f"{AFFINE} y = Conv<group = 8>(z, d)"), DATA)
    widened = build(X, "float z", AFFINE, a=array(smoothed, "a"), c=array(smoothed, "c"))
    largest = np.sort(np.abs(np.concatenate([run(widened, x=x)["z"] for x in DATA])).max((0, 2, 3)))
    assert np.isclose(largest[:-1], largest[-1] / 2, rtol=1e-3).sum() >= 2
