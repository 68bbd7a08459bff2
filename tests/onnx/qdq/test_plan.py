import numpy as np
import onnx
import pytest

from klquant.backends.onnx import calibrate, inspect, quantize
from klquant.backends.onnx.model.graph import read_graph
from klquant.backends.onnx.model.observed import observed_tensors
from klquant.backends.onnx.model.operators import weight_axis
from klquant.backends.onnx.qdq.explicit import explicit
from klquant.backends.onnx.qdq.kernels import operators
from klquant.backends.onnx.qdq.plan import EVERYONE
from klquant.backends.onnx.qdq.rules import make_plan
from support.onnx_models import build

IMAGE = "float[n, 3, 8, 8] x"


def conv_relu_conv():
    body = "a = Conv(x, w, b) b1 = Relu(a) y = Conv(b1, v)"
    return build(IMAGE, "float[n, 2, 4, 4] y", body, w=(4, 3, 3, 3), b=(4,), v=(2, 4, 3, 3))


def residual(shortcut="s = Identity(x)"):
    body = f"a = Conv<pads=[1,1,1,1]>(x, w) r = Relu(a) c = Conv<pads=[1,1,1,1]>(r, v) {shortcut} y = Add(c, s)"
    return build(IMAGE, "float[n, 3, 8, 8] y", body, w=(4, 3, 3, 3), v=(3, 4, 3, 3), u=(3, 3, 1, 1))


def plan(rule, model, known=None, exclude=(), **options):
    graph = read_graph(model)
    return rule(graph, observed_tensors(graph) if known is None else known, exclude, **options)


def tensorrt(model, **options):
    return plan(explicit, model, layers_only=False, **options)


def onnxruntime(model, **options):
    return plan(operators, model, **options)


def test_tensors_that_only_a_rectifier_reads_are_not_observed():
    assert observed_tensors(read_graph(conv_relu_conv())) == ["x", "b1", "y"]


def for_everyone(readers, *names):
    return readers == {name: {EVERYONE} for name in names}


def test_explicit_quantizes_inputs_of_layers_only():
    found = tensorrt(conv_relu_conv())
    assert found.readers == {"x": {"conv0"}, "b1": {"conv2"}}
    assert found.weights == {"conv0": 0, "conv2": 0}
    assert not found.skipped


def test_explicit_quantizes_the_shortcut_and_not_the_branch():
    model = residual("s = Relu(x)")
    assert tensorrt(model).readers["s"] == {"add4"}
    assert "c" not in tensorrt(model).readers


@pytest.mark.parametrize("order", ["c, s", "s, c"])
def test_of_two_layers_the_less_deep_one_is_the_shortcut(order):
    model = residual("s = Conv(x, u)")
    model.graph.node[-1].input[:] = order.split(", ")
    assert tensorrt(model).readers["s"] == {"add4"}
    assert "c" not in tensorrt(model).readers


def test_a_sum_without_a_layer_is_not_quantized():
    model = build("float[n, 4] x", "float[n, 4] y", "a = Relu(x) b = Sigmoid(x) y = Add(a, b)")
    assert not tensorrt(model).readers


def test_a_tensor_with_other_readers_is_not_a_residual_branch():
    model = residual("s = Relu(c)")
    assert not {"s", "c"} & tensorrt(model).readers.keys()


def test_openvino_quantizes_inputs_of_layers_only():
    graph = read_graph(residual("s = Relu(x)"))
    assert make_plan(graph, observed_tensors(graph), "openvino").readers == {"x": {"conv0"}, "r": {"conv2"}}
    assert "s" in make_plan(graph, observed_tensors(graph), "tensorrt").readers


def test_the_addend_of_a_product_is_not_quantized():
    model = build("float[n, 4] x", "float y", "c = Relu(x) y = Gemm(x, w, c)", w=(4, 4))
    assert tensorrt(model).readers == {"x": {"gemm1"}}


def test_an_output_of_the_model_is_quantized_before_its_rectifier():
    model = conv_relu_conv()
    model.graph.output.append(onnx.helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, None))
    assert for_everyone(onnxruntime(model).readers, "x", "a", "b1", "y")


def test_explicit_for_layers_only_skips_sums_and_concatenations():
    found = plan(explicit, residual("s = Relu(x)"), layers_only=True)
    assert found.readers == {"x": {"conv0"}, "r": {"conv2"}}


def test_inputs_of_a_concatenation_share_the_scale_of_a_quantized_output():
    body = "a = Conv(x, w) b = Relu(x) e = Conv(b, w) c = Concat<axis=1>(a, e) y = Conv(c, v)"
    model = build(IMAGE, "float[n, 2, 4, 4] y", body, w=(4, 3, 3, 3), v=(2, 8, 3, 3))
    found = tensorrt(model)
    assert found.shared == [("a", "e", "c")]
    assert {name: found.readers[name] for name in "aec"} == {"a": {"concat3"}, "e": {"concat3"}, "c": {"conv4"}}


def test_a_concatenation_whose_result_is_not_quantized_stays():
    body = "a = Conv(x, w) b = Relu(x) e = Conv(b, w) c = Concat<axis=1>(a, e) y = Exp(c)"
    assert not tensorrt(build(IMAGE, "float[n, 8, 6, 6] y", body, w=(4, 3, 3, 3))).shared


def test_onnxruntime_quantizes_around_operators_and_behind_rectifiers():
    found = onnxruntime(conv_relu_conv())
    assert for_everyone(found.readers, "x", "b1", "y")


def test_onnxruntime_quantizes_both_sides_of_a_sum():
    found = onnxruntime(residual("s = Conv(x, u)"))
    assert for_everyone(found.readers, "x", "r", "c", "s", "y")


def test_onnxruntime_leaves_a_sum_with_a_side_in_floating_point():
    found = onnxruntime(residual("s = Exp(x)"))
    assert found.readers == {"x": {"conv0"}, "r": {EVERYONE}, "c": {EVERYONE}}


def test_onnxruntime_carries_one_scale_through_a_pool():
    body = "a = Conv(x, w) r = Relu(a) p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r) y = Conv(p, v)"
    found = onnxruntime(build(IMAGE, "float[n, 2, 1, 1] y", body, w=(4, 3, 3, 3), v=(2, 4, 3, 3)))
    assert found.shared == [("r", "p")]


def test_onnxruntime_leaves_logits_in_floating_point():
    body = "h = Gemm(x, w, b) r = Relu(h) y = Gemm(r, v, c)"
    model = build("float[n, 8] x", "float[n, 2] y", body, w=(8, 4), b=(4,), v=(4, 2), c=(2,))
    assert for_everyone(onnxruntime(model).readers, "x", "r")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = ConvTranspose(x, w)", "onnxruntime has no INT8 kernel for ConvTranspose"),
        ("y = Conv(x, w) z = Exp(y)", "no threshold is known for its output `y`"),
    ],
)
def test_onnxruntime_says_why_a_layer_stays(body, reason):
    model = build(IMAGE, "float[n, a, b, c] y", body, w=(3, 3, 3, 3))
    found = onnxruntime(model, known=["x"])
    assert list(found.skipped.values()) == [reason]
    assert not found.readers


def test_a_scaled_product_has_no_kernel():
    model = build("float[n, 8] x", "float[n, 4] y", "y = Gemm<alpha=2.0>(x, w)", w=(8, 4))
    assert "alpha" in onnxruntime(model).skipped["gemm0"]
    assert not tensorrt(model).skipped


@pytest.mark.parametrize("rule", [tensorrt, onnxruntime])
def test_a_layer_without_an_input_threshold_stays_in_floating_point(rule):
    found = rule(conv_relu_conv(), known=["x", "y"])
    assert found.skipped == {"conv2": "no threshold is known for its input `b1`"} | (
        {"conv0": "no threshold is known for its output `b1`"} if rule is onnxruntime else {}
    )


@pytest.mark.parametrize("pattern", ["conv2", "b1"])
@pytest.mark.parametrize("rule", [tensorrt, onnxruntime])
def test_excluded_layers_stay_in_floating_point(rule, pattern):
    found = rule(conv_relu_conv(), exclude=(pattern,))
    assert found.skipped["conv2"] == "excluded by the settings"
    assert "conv2" not in found.weights


def test_an_operator_is_excluded_by_its_type():
    assert set(tensorrt(conv_relu_conv(), exclude=("Conv",)).skipped) == {"conv0", "conv2"}


def test_a_product_of_two_activations_is_quantized_at_both():
    model = build("float[n, 4, 4] x", "float[n, 4, 4] y", "a = Relu(x) y = MatMul(x, a)")
    assert tensorrt(model).readers == {"x": {"matmul1"}, "a": {"matmul1"}}
    assert not tensorrt(model).weights


def test_a_product_with_a_constant_on_the_left_stays_in_floating_point():
    model = build("float[4, 4] x", "float[4, 4] y", "y = MatMul(w, x)", w=(4, 4))
    assert tensorrt(model).skipped == {"matmul0": "its weight is not a constant second input"}


def test_float64_is_not_quantized():
    model = build("double[n, 4] x", "double[n, 4] y", "y = MatMul(x, w)", w=np.eye(4))
    assert "neither float32 nor float16" in tensorrt(model).skipped["matmul0"]


@pytest.mark.parametrize(
    ("body", "shape", "axis"),
    [
        ("y = Conv(x, w)", (4, 3, 3, 3), 0),
        ("y = ConvTranspose(x, w)", (3, 4, 3, 3), 1),
        ("f = Flatten(x) y = Gemm(f, w)", (192, 4), 1),
        ("f = Flatten(x) y = Gemm<transB=1>(f, w)", (4, 192), 0),
        ("y = MatMul(x, w)", (8, 4), 1),
        ("y = MatMul(x, w)", (3, 8, 4), None),
    ],
)
def test_output_channels_lie_on_their_axis(body, shape, axis):
    model = build(IMAGE, "float y", body, w=shape)
    graph = read_graph(model)
    assert weight_axis(graph, graph.nodes[-1]) == axis


def test_what_stays_in_floating_point_reads_what_is_not_rounded():
    body = "n = LayerNormalization(x, g) f = MatMul(n, w) b = Add(f, g) y = Add(n, b)"
    found = onnxruntime(build("float[n, 4, 8] x", "float[n, 4, 8] y", body, g=(8,), w=(8, 8)))
    assert found.readers == {"n": {"matmul1"}}
    assert found.weights == {"matmul1": 1}


def test_a_kernel_in_int8_gives_rounded_values_to_all():
    """Its quantizer must alone read its output."""
    body = "c = Conv(x, w) e = Exp(c) d = Conv(c, v) y = Exp(d)"
    found = onnxruntime(build(IMAGE, "float[n, 2, 4, 4] y", body, w=(4, 3, 3, 3), v=(2, 4, 3, 3)))
    assert for_everyone(found.readers, "x", "c", "d")


@pytest.mark.parametrize(
    ("rest", "rounded"),
    [
        ("y = Exp(f)", {"x"}),
        ("t = Transpose(f) y = Exp(t)", {"x"}),
        ("t = Transpose(f) r = Transpose(t) y = Exp(r)", {"x"}),
        ("t = Transpose(f) y = MatMul(t, w)", {"x", "f", "t"}),
        ("s = Softmax(f) y = MatMul(s, w)", {"x", "f", "s"}),
        ("s = Softmax(f) t = Transpose(s) y = MatMul(t, w)", {"x", "f", "t"}),
        ("s = Softmax(f) y = Exp(s)", {"x"}),
    ],
)
def test_only_arithmetic_in_int8_is_a_reason_for_a_quantizer(rest, rounded):
    model = build("float[8, 8] x", "float y", f"f = MatMul(x, w) {rest}", w=(8, 8))
    assert onnxruntime(model).readers.keys() == rounded


SELECTIONS = [
    "s = Slice(a, zero, two, one)",
    "s, t = Split<axis=1>(a, parts)",
    "s = Gather<axis=1>(a, two)",
    "s = DepthToSpace<blocksize=2>(a)",
    'u = Resize<mode="nearest">(a, , scales) s = Slice(u, zero, two, one)',
    "u = Tile(a, tiles) s = Slice(u, zero, two, one)",
    "u = ReduceMax<axes=[2]>(a) s = Slice(u, zero, two, one)",
    "u = Slice(a, zero, two, one) q = Slice(u, zero, two, one) s = Concat<axis=1>(u, q)",
]


def selection(body, rest="y = Conv(s, v)"):
    constants = {
        "zero": np.array([0]), "one": np.array([1]), "two": np.array([2]), "parts": np.array([2, 2]),
        "scales": np.array([1, 1, 2, 2], np.float32), "tiles": np.array([1, 1, 2, 2]),
    }  # fmt: skip
    channels = 1 if "Gather" in body or "Depth" in body else 4 if "Concat" in body else 2
    text = f"a = Conv(x, w) {body} {rest}"
    used = {name: value for name, value in constants.items() if name in text}
    return build(IMAGE, "float y", text, w=(4, 3, 3, 3), v=(2, channels, 1, 1), **used)


@pytest.mark.parametrize("body", SELECTIONS)
def test_onnxruntime_selects_integers(body):
    model, x = selection(body), np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    found = onnxruntime(model)
    assert {"a", "s"} <= found.readers.keys()
    quantized = quantize(model, calibrate(model, [x], criterion="max"), engine="onnxruntime", batches=[x])
    assert all(node.int8 for node in inspect(quantized.model, "onnxruntime"))
    assert any("s" in names for names in found.shared) == ("Concat" not in body)
    assert quantized.thresholds.keys() <= set(observed_tensors(read_graph(model)))


@pytest.mark.parametrize(
    ("body", "rest"),
    [
        ("e = Exp(a) s = Slice(e, zero, two, one)", "y = Conv(s, v)"),
        ('u = Resize<mode="linear">(a, , scales) s = Slice(u, zero, two, one)', "y = Conv(s, v)"),
    ],
)
def test_what_onnxruntime_does_not_select_in_integers(body, rest):
    assert not any({"s"} & set(names) for names in onnxruntime(selection(body, rest)).shared)


def test_the_floats_of_a_product_are_selected_as_floats():
    body = "a = MatMul(x, w) s = Slice(a, zero, two, one) y = MatMul(s, w)"
    constants = {"zero": np.array([0]), "one": np.array([1]), "two": np.array([2])}
    model = build("float[n, 8, 8] x", "float y", body, w=(8, 8), **constants)
    assert onnxruntime(model).readers.keys() == {"x", "s"}


@pytest.mark.parametrize(
    ("body", "quantized"),
    [
        ("r = Relu(c) p = MaxPool<kernel_shape = [2, 2]>(r) y = Conv(p, v)", True),
        ("r = Relu(c) p = MaxPool<kernel_shape = [2, 2]>(r) y = GlobalAveragePool(p)", True),
        ("s = Add(c, c) p = MaxPool<kernel_shape = [2, 2]>(s) y = Conv(p, v)", True),
        ("s = Add(c, c) p = MaxPool<kernel_shape = [2, 2]>(s) y = GlobalAveragePool(p)", False),
    ],
)
def test_max_pooling_is_quantized_beside_a_convolution(body, quantized):
    """Elsewhere onnxruntime's UINT8 kernel is slower than floating point."""
    used = {"v": (4, 4, 1, 1)} if "v)" in body else {}
    found = onnxruntime(build(IMAGE, "float y", f"c = Conv(x, w) {body}", w=(4, 3, 3, 3), **used))
    assert ("p" in found.readers) == quantized


def test_scalars_are_quantized_beside_what_an_int8_kernel_computes():
    body = "c = Conv(x, w) s = Add(c, one) m = Mul(s, g) e = Exp(m) y = Add(e, one)"
    model = build(IMAGE, "float[n, 4, 6, 6] y", body, w=(4, 3, 3, 3), one=np.float32(1), g=(4, 1, 1))
    assert onnxruntime(model).operands == {"add1"}
    found = onnxruntime(model, products={"mul2"})
    assert found.operands == {"add1", "mul2"}
    assert for_everyone(found.readers, "x", "c", "s", "m")


@pytest.mark.parametrize("value", [np.float32(0), np.array([1, np.inf], np.float32)])
def test_constants_that_have_no_integers_keep_their_node_in_floating_point(value):
    model = build("float[n, 3, 8, 2] x", "float y", "c = Conv(x, w) y = Add(c, k)", w=(4, 3, 3, 1), k=value)
    assert not onnxruntime(model).operands
