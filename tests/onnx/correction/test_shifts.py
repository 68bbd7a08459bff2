import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from klquant.backends.onnx import prepare
from klquant.backends.onnx.correction.parameters import with_parameters
from klquant.backends.onnx.correction.shifts import find_shifts, moved
from klquant.backends.onnx.qdq.rules import make_plan
from support.onnx_models import build, run_all

rng = np.random.default_rng(0)
IMAGE, ROWS, FLAT = "float[n, 3, 6, 6] x", "float[n, 5, 8] x", "float[n, 8] x"
SIZES = {IMAGE: (2, 3, 6, 6), ROWS: (2, 5, 8), FLAT: (2, 8)}
X = {inputs: rng.normal(size=size).astype(np.float32) for inputs, size in SIZES.items()}
CONSTANTS = {
    "w": (4, 3, 1, 1),
    "b": (4,),
    "v": (6, 4, 1, 1),
    "c": (6,),
    "d": (4, 1, 3, 3),
    "half": (4, 2, 1, 1),
    "k": np.float32([0.7]),
    "each": (4, 1, 1),
    "s": np.float32([0.2]),
    "p": (8, 4),
    "o": (8, 4),
    "square": (8, 8),
    "turned": (4, 8),
    "deep": (1, 1, 4, 1, 1),
    "g": (8,),
    "e": (8,),
    "row": (6,),
}
AFFINE = "m = Mul(t, k) a = Add(m, s) y = Sigmoid(a)"
NORM = "t = LayerNormalization(x, g, e)"


def network(inputs, body, outputs="float y", **options):
    return prepare(build(inputs, outputs, body, **{**CONSTANTS, **options}))


def shifts_of(prepared):
    return find_shifts(prepared.graph, make_plan(prepared.graph, ["t"], "tensorrt")._replace(readers={"t": {"*"}}))


@pytest.mark.parametrize(
    ("inputs", "body"),
    [
        (IMAGE, "t = Conv(x, w, b) y = Conv(t, v, c)"),
        (IMAGE, "t = Conv(x, w) y = Conv(t, v)"),
        (IMAGE, "t = Conv(x, w, b) y = Conv<group = 4>(t, d)"),
        (IMAGE, "t = Conv(x, w, b) y = Conv<group = 2>(t, half)"),
        (IMAGE, 't = Conv(x, w, b) y = Conv<auto_pad = "VALID", group = 4>(t, d)'),
        (IMAGE, f"t = Conv(x, w, b) {AFFINE}"),
        (IMAGE, "t = Conv(x, w, b) m = Mul(each, t) a = Add(s, m) y = Relu(a)"),
        (IMAGE, "t = Conv(x, w, b) a = Add(s, t) y = Sigmoid(a)"),
        (IMAGE, "f = Conv(x, w, b) r = Sigmoid(f) t = Add(r, s) y = Conv(t, v, c)"),
        (IMAGE, f"t = Conv(x, w, b) z = Conv(t, v, c) {AFFINE}"),
        (FLAT, "f = Gemm(x, square, e) r = Relu(f) t = Add(r, e) y = Gemm<alpha = 0.5>(t, p, b)"),
        (FLAT, "t = Gemm(x, square, e) y = Gemm<transB = 1>(t, turned, b)"),
        (ROWS, f"{NORM} m = MatMul(t, p) y = Add(m, b)"),
        (ROWS, "r = Relu(x) t = Add(r, e) m = MatMul(t, p) a = Add(b, m) y = Relu(a)"),
        (ROWS, f"{NORM} m = MatMul(t, p) a = Add(m, b) l = MatMul(t, o) n = Add(l, s) y = Mul(a, n)"),
    ],
)
def test_a_shift_leaves_the_outputs_as_they_are(inputs, body):
    model = network(inputs, body, "float y, float z" if " z = " in body else "float y")
    shift = shifts_of(model)["t"]
    exact = run_all(model.model, x=X[inputs])
    channels = exact["t"].shape[shift.axis]
    by = rng.normal(size=channels)
    found = run_all(with_parameters(model, moved({"t": shift}, {"t": by})).model, x=X[inputs])
    spread = by.reshape(-1, *[1] * (-1 - shift.axis))
    np.testing.assert_allclose(found["t"], exact["t"] + spread, rtol=1e-4, atol=1e-5)
    for name in ("y", "z"):
        if name in exact:
            np.testing.assert_allclose(found[name], exact[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "body", "outputs"),
    [
        (IMAGE, "t = Conv(x, w, b) y = Conv<group = 4, pads = [1, 1, 1, 1]>(t, d)", "float y"),  # zeros at the border
        (IMAGE, 't = Conv(x, w, b) y = Conv<auto_pad = "SAME_UPPER", group = 4>(t, d)', "float y"),
        (IMAGE, "t = Conv(x, w, b) y = Conv(t, v, c)", "float y, float t"),
        (IMAGE, "t = Conv(x, w, b) r = Sigmoid(t) z = Conv(t, v, c) y = Conv(r, v, c)", "float y, float z"),
        (IMAGE, "f = Conv(x, w, b) t = Sigmoid(f) y = Conv(t, v, c)", "float y"),
        (IMAGE, "t = Conv(x, w, b) y = Mul(t, k)", "float y"),
        (IMAGE, "t = Conv(x, w, b) m = Mul(t, k) a = Add(m, deep) y = Sigmoid(a)", "float y"),  # of five dimensions
        (IMAGE, "t = Conv(x, w, b) m = Mul(t, k) r = Relu(m) y = Add(m, s)", "float y, float r"),
        (ROWS, "r = Relu(x) t = Add(r, e) y = MatMul(t, p)", "float y"),  # no bias behind
        (ROWS, "r = Relu(x) t = Add(r, x) m = MatMul(t, p) y = Add(m, b)", "float y"),
        ("float[n, 3, 4, 6] x", "f = Conv(x, w, b) r = Relu(f) t = Add(r, row) y = Conv(t, v, c)", "float y"),
    ],
)
def test_some_tensors_cannot_be_shifted(inputs, body, outputs):
    assert shifts_of(network(inputs, body, outputs)) == {}


def test_constants_of_operators_in_int8_stay():
    model = network(IMAGE, f"t = Conv(x, w, b) {AFFINE}")
    plan = make_plan(model.graph, ["t"], "tensorrt")._replace(readers={"t": {"*"}})
    node = {n.op_type: n.name for n in model.graph.nodes}
    assert find_shifts(model.graph, plan)
    for quantized in ({node["Mul"]}, {node["Add"]}):
        assert find_shifts(model.graph, plan._replace(operands=quantized)) == {}
    assert find_shifts(model.graph, plan._replace(readers={"t": {"*"}, "m": {"*"}})).keys() == set()


def test_half_precision_stays_as_it_is():
    half = {name: rng.normal(size=value).astype(np.float16) for name, value in CONSTANTS.items() if name in "wbvc"}
    model = network("float16[n, 3, 6, 6] x", "t = Conv(x, w, b) y = Conv(t, v, c)", "float16 y", **half)
    assert shifts_of(model) == {}


@given(st.lists(st.floats(-10, 10), min_size=8, max_size=8))
def test_shifts_that_meet_in_one_constant_add_up(by):
    model = network(IMAGE, "t = Conv(x, w, b) u = Conv(t, v, c) m = Mul(u, k) a = Add(m, s) y = Sigmoid(a)")
    plan = make_plan(model.graph, ["t", "u"], "tensorrt")._replace(readers={"t": {"*"}, "u": {"*"}})
    shifts = find_shifts(model.graph, plan)
    assert shifts.keys() == {"t", "u"}
    each = {"t": np.array(by[:4]), "u": np.array(by[2:])}
    exact, found = (run_all(one.model, x=X[IMAGE]) for one in (model, with_parameters(model, moved(shifts, each))))
    np.testing.assert_allclose(found["u"], exact["u"] + each["u"].reshape(-1, 1, 1), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found["y"], exact["y"], rtol=1e-3, atol=1e-3)
