import numpy as np
import onnx
import pytest
from onnx import TensorProto

import klquant
from klquant.backends.onnx.model.graph import read_graph
from klquant.backends.onnx.qdq.grids import Grid, by_sign, make_grids, signed, unsigned
from klquant.backends.onnx.qdq.insertion import write_qdq
from klquant.backends.onnx.qdq.plan import EVERYONE, Plan
from support.onnx_models import array, build, run, run_all

IMAGE = "float[n, 3, 8, 8] x"
X = np.random.default_rng(1).normal(size=(2, 3, 8, 8)).astype(np.float32)


def write(model, readers, weights=None, thresholds=None, rule=signed, **options):
    plan = Plan(readers, weights or {}, [], {})
    grids = make_grids(plan, thresholds or dict.fromkeys(readers, 2.0), set(), rule)
    written = write_qdq(model, read_graph(model), plan, grids, **{"int_bias": False, "reduce_range": False, **options})
    onnx.checker.check_model(written, full_check=True)
    return written


def rounded(x, threshold=2.0):
    """Return the values that an INT8 engine reads, with -128 as the lowest level."""
    scale = np.float32(threshold / 127)
    return np.clip(np.rint(x / scale), -128, 127) * scale


def two_readers(**options):
    return build(IMAGE, "float y, float z", "y = Conv(x, w, b) z = Neg(x)", w=(4, 3, 3, 3), b=(4,), **options)


def test_only_the_planned_readers_see_rounded_values():
    found = run(write(two_readers(), {"x": {"conv0"}}), x=X)
    expected = run(two_readers(), x=rounded(X))
    np.testing.assert_allclose(found["y"], expected["y"], atol=1e-5)
    np.testing.assert_array_equal(found["z"], -X)


def test_all_readers_read_rounded_values():
    found = run(write(two_readers(), {"x": {EVERYONE}}), x=X)
    np.testing.assert_allclose(found["z"], -rounded(X), atol=1e-6)


def test_weights_are_integers_by_channel():
    model = two_readers()
    written = write(model, {"x": {"conv0"}}, {"conv0": 0})
    weight = array(model, "w")
    scale = np.abs(weight).max((1, 2, 3)) / np.float32(127)
    np.testing.assert_array_equal(array(written, "w_quantized"), klquant.quantize(weight, scale, axis=0))
    np.testing.assert_array_equal(array(written, "w_scale"), scale)
    assert "w" not in {tensor.name for tensor in written.graph.initializer}
    exact = build(
        IMAGE, "float y, float z", "y = Conv(x, w, b) z = Neg(x)", b=array(model, "b"),
        w=klquant.fake_quantize(weight, scale, axis=0),
    )  # fmt: skip
    np.testing.assert_allclose(run(written, x=X)["y"], run(exact, x=rounded(X))["y"], atol=1e-5)


def test_a_weight_that_a_float_node_reads_too_stays_for_it():
    model = build("float[n, 4] x", "float y, float z", "y = MatMul(x, w) z = MatMul(x, w)", w=(4, 4))
    written = write(model, {"x": {"matmul0"}}, {"matmul0": 1})
    x = X.reshape(-1, 4)
    np.testing.assert_array_equal(run(written, x=x)["z"], run(model, x=x)["z"])
    assert not np.array_equal(run(written, x=x)["y"], run(model, x=x)["y"])


def test_layers_that_share_a_weight_share_its_integers():
    model = build("float[n, 4] x", "float y", "a = MatMul(x, w) y = MatMul(a, w)", w=(4, 4))
    written = write(model, {"x": {"matmul0"}, "a": {"matmul1"}}, {"matmul0": 1, "matmul1": 1})
    assert sum(node.op_type == "DequantizeLinear" for node in written.graph.node) == 3


def test_a_bias_becomes_int32_in_steps_of_the_products():
    model = two_readers()
    written = write(model, {"x": {EVERYONE}}, {"conv0": 0}, int_bias=True)
    scale = np.float32(2 / 127) * array(written, "w_scale")
    np.testing.assert_allclose(array(written, "b_scale"), scale, rtol=1e-6)
    np.testing.assert_array_equal(array(written, "b_quantized"), np.rint(array(model, "b") / scale.astype(np.float64)))
    plain = write(model, {"x": {EVERYONE}}, {"conv0": 0})
    np.testing.assert_allclose(run(written, x=X)["y"], run(plain, x=X)["y"], atol=1e-3)


def test_a_bias_of_two_layers_has_a_scale_for_each():
    body = "a = Gemm(x, w, b) y = Gemm(a, v, b)"
    model = build("float[n, 4] x", "float y", body, w=(4, 4), v=(4, 4), b=(4,))
    readers = {"x": {EVERYONE}, "a": {EVERYONE}}
    written = write(model, readers, {"gemm0": 1, "gemm1": 1}, {"x": 2.0, "a": 8.0}, int_bias=True)
    assert not np.array_equal(array(written, "b_quantized"), array(written, "b_quantized_"))
    x = X.reshape(-1, 4)
    plain = write(model, readers, {"gemm0": 1, "gemm1": 1}, {"x": 2.0, "a": 8.0})
    np.testing.assert_allclose(run(written, x=x)["y"], run(plain, x=x)["y"], atol=0.1)


def test_a_graph_output_keeps_its_name_and_is_rounded():
    model = build(IMAGE, "float y", "y = Relu(x)")
    written = write(model, {"y": {EVERYONE}})
    assert [output.name for output in written.graph.output] == ["y"]
    np.testing.assert_allclose(run(written, x=X)["y"], rounded(np.maximum(X, 0)), atol=1e-6)


def test_a_graph_output_that_a_layer_reads_stays_in_floating_point_for_the_caller():
    model = build(IMAGE, "float a, float y", "a = Relu(x) y = Conv(a, w)", w=(4, 3, 3, 3))
    found = run(write(model, {"a": {"conv1"}}), x=X)
    np.testing.assert_array_equal(found["a"], np.maximum(X, 0))


@pytest.mark.parametrize(
    ("rule", "non_negative", "expected"),
    [
        (signed, True, Grid(2.0, 2 / 127, 0, TensorProto.INT8)),
        (by_sign, True, Grid(2.0, 2 / 255, 0, TensorProto.UINT8)),
        (by_sign, False, Grid(2.0, 2 / 127, 0, TensorProto.INT8)),
        (unsigned, True, Grid(2.0, 2 / 255, 0, TensorProto.UINT8)),
        (unsigned, False, Grid(2.0, 2 / 127, 128, TensorProto.UINT8)),
    ],
)
def test_grids_follow_their_rule(rule, non_negative, expected):
    assert rule(2.0, non_negative) == expected


def test_unsigned_integers_give_the_same_values_as_signed_ones():
    model = build(IMAGE, "float y", "y = Neg(x)")
    ours, theirs = (run_all(write(model, {"x": {EVERYONE}}, rule=rule), x=X) for rule in (signed, unsigned))
    np.testing.assert_array_equal(ours["y"], theirs["y"])
    np.testing.assert_array_equal(ours["x_quantized"].astype(int) + 128, theirs["x_quantized"])


def test_shared_scales_are_the_largest_of_a_group_also_of_overlapping_ones():
    plan = Plan({name: {EVERYONE} for name in "abcd"}, {}, [("a", "b"), ("b", "c")], {})
    grids = make_grids(plan, {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}, {"a", "b"}, by_sign)
    assert {name: grid.threshold for name, grid in grids.items()} == {"a": 3.0, "b": 3.0, "c": 3.0, "d": 4.0}
    assert grids["a"].dtype == TensorProto.INT8


def test_names_in_use_are_not_used_again():
    model = build(IMAGE, "float y", "x_quantized = Relu(x) x_scale = Neg(x_quantized) y = Add(x_scale, x)")
    found = run(write(model, {"x": {"add2"}}), x=X)
    np.testing.assert_allclose(found["y"], -np.maximum(X, 0) + rounded(X), atol=1e-5)


def test_half_precision_has_scales_of_its_type():
    model = build("float16[n, 4] x", "float16 y", "y = MatMul(x, w)", opset=19, w=np.eye(4, dtype=np.float16))
    written = write(model, {"x": {"matmul0"}}, {"matmul0": 1})
    assert {array(written, name).dtype for name in ("x_scale", "w_scale")} == {np.dtype(np.float16)}
    x = X.reshape(-1, 4).astype(np.float16)
    assert np.abs(run(written, x=x)["y"] - np.clip(x, -2, 2)).max() < 0.02


def test_the_model_that_is_given_does_not_change():
    model = two_readers()
    before = model.SerializeToString()
    write(model, {"x": {EVERYONE}}, {"conv0": 0}, int_bias=True)
    assert model.SerializeToString() == before


def test_tensors_read_by_a_subgraph_stay():
    body = """
        c = ReduceMax<keepdims=0>(x)
        p = Greater(c, zero)
        y = If (p) <
            then_branch = yes () => (float[n, 4] a) { a = Mul(x, w) },
            else_branch = no () => (float[n, 4] b) { b = Neg(x) }
        >
    """
    model = build("float[n, 4] x", "float y", body, w=(4,), zero=np.float32(0))
    written = write(model, {"x": {"reducemax0"}})
    x = X.reshape(-1, 4)
    np.testing.assert_array_equal(run(written, x=x)["y"], run(model, x=x)["y"])


def test_graph_reads_types_of_all_tensors():
    graph = read_graph(two_readers())
    assert graph.types["y"] == graph.types["x"] == TensorProto.FLOAT
    assert graph.is_activation("y")
    assert not graph.is_activation("w")
