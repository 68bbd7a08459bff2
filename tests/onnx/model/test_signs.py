import numpy as np
import pytest
from onnx import numpy_helper, parser

from klquant.backends.onnx.model.graph import read_graph
from klquant.backends.onnx.model.signs import non_negative
from support.onnx_models import build

IMAGE = "float[n, 3, 8, 8] x"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = Relu(x)", {"y"}),
        ("y = Clip(x, zero, six)", {"y"}),
        ("y = Clip(x, minus, six)", set()),
        ("y = Clip(x)", set()),
        ("y = Clip(x, zeros, six)", set()),  # not a number: no ONNX, and no reason to end here
        ("a = Sigmoid(x) y = MaxPool<kernel_shape=[2,2]>(a)", {"a", "y"}),
        ("a = Relu(x) y = Add(a, x)", {"a"}),
        ("a = Relu(x) y = Add(a, minus)", {"a"}),
        ("a = Relu(x) y = Mul(a, six)", {"a", "y"}),
        ("a = Relu(x) b = Sigmoid(x) y = Concat<axis=1>(a, b)", {"a", "b", "y"}),
        ("a = Relu(x) y = Neg(a)", {"a"}),
    ],
)
def test_what_cannot_be_negative(body, expected):
    bounds = {"zero": np.float32(0), "six": np.float32(6), "minus": np.float32(-1), "zeros": np.zeros(2)}
    assert non_negative(read_graph(build(IMAGE, "float y", body, **bounds))) == expected


SCALES = np.array([1, 1, 2, 2], np.float32)
BORDER = np.array([0, 0, 1, 1, 0, 0, 1, 1])
INDICES = np.array([0, 1])


def signs(body, image=IMAGE, **constants):
    given = {"s": SCALES, "p": BORDER, "i": INDICES, "zero": np.float32(0), "minus": np.float32(-1)} | constants
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]> g ({image}) => (float y) {{ {body} }}')
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in given.items())
    return non_negative(read_graph(model))


@pytest.mark.parametrize(
    "operator",
    [
        "Resize({}, , s)",
        'Resize<mode="linear">({}, , s)',
        "Pad({}, p)",
        "Pad({}, p, zero)",
        'Pad<mode="edge">({}, p)',
        'Pad<mode="reflect">({}, p, minus)',
        "Slice({}, i, i)",
        "Gather<axis=1>({}, i)",
        "Squeeze({}, i)",
        "Unsqueeze({}, i)",
        "Expand({}, i)",
        "Tile({}, i)",
        "Identity({})",
        "DepthToSpace<blocksize=2>({})",
        "GlobalMaxPool({})",
        "Cast<to=1>({})",
        "Where(c, {}, zero)",
        "Clip({})",
    ],
)
def test_what_follows_keeps_the_sign(operator):
    assert "y" in signs(f"a = Relu(x) y = {operator.format('a')}")
    assert "y" not in signs(f"y = {operator.format('x')}")


def test_all_parts_of_a_split_keep_the_sign():
    assert {"b", "c"} <= signs("a = Relu(x) b, c = Split<axis=1, num_outputs=2>(a) y = Add(b, c)")
    assert not signs("b, c = Split<axis=1, num_outputs=2>(x) y = Add(b, c)")


@pytest.mark.parametrize("operator", ["Softmax", "HardSigmoid", "Sigmoid", "Softplus", "Exp", "Abs", "Sqrt"])
def test_operators_without_negative_results(operator):
    assert signs(f"y = {operator}(x)") == {"y"}


@pytest.mark.parametrize(
    "operator",
    [
        'Resize<mode="cubic">(a, , s)',
        "Resize<extrapolation_value=-1.0>(a, , s)",
        "Pad(a, p, minus)",
        "Max(x, minus)",
        "Min(a, x)",
        "Sub(a, a)",
        "Log(a)",
        "Clip(a, minus, minus)",
        "other.Abs(x)",
        "Where(c, a, minus)",
        "Cast<to=6>(a)",
        "Mul(x, a)",
    ],
)
def test_what_may_be_negative(operator):
    assert signs(f"a = Relu(x) y = {operator}") == {"a"}


def test_squares_and_largest_values():
    assert signs("y = Mul(x, x)") == {"y"}
    assert signs("y = Max(x, zero)") == {"y"}


def test_a_picture_of_bytes_has_no_negative_values():
    assert signs("y = Cast<to=1>(x)", image="uint8[n, 3, 8, 8] x") == {"y"}
