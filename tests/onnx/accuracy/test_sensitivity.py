import json

import numpy as np
import onnx
import pytest

import klquant
from klquant.backends.onnx import calibrate, prepare, quantize, sensitivity
from klquant.backends.onnx.accuracy.sensitivity import quantizer_costs, rank_layers
from klquant.backends.onnx.accuracy.switches import switched
from klquant.backends.onnx.model.operators import unscaled
from klquant.backends.onnx.placement import place
from support.onnx_models import build, run

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 3, 8, 8)).astype(np.float32)
BODY = """
    a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
    r = Relu (a)
    c = Conv <pads = [1, 1, 1, 1]> (r, w2)
    s = Add (c, r)
    p = GlobalAveragePool (s)
    f = Flatten (p)
    y = Gemm (f, w3)
"""


def network(spread=0.0):
    """Return a model whose first layer has channels of very different ranges if `spread` is large."""
    rng = np.random.default_rng(1)  # the same in any order of the tests
    w1 = rng.normal(size=(4, 3, 3, 3)) * np.exp(spread * np.arange(4)).reshape(4, 1, 1, 1)
    return build("float[n, 3, 8, 8] x", "float[n, 5] y", BODY, w1=w1.astype(np.float32), b1=np.ones(4, np.float32),
                 w2=(4, 4, 3, 3), w3=(4, 5))  # fmt: skip


@pytest.fixture(scope="module", params=["onnxruntime", "openvino", "tensorrt"])
def case(request):
    prepared = prepare(network())
    calibration = calibrate(prepared, [X], criterion="max")
    return prepared, calibration, quantize(prepared, calibration, engine=request.param).model, request.param


def test_no_quantizer_rounds_unless_it_is_selected(case):
    prepared, _, quantized, _ = case
    switches = switched(prepared.graph, quantized)
    model, names = switches
    onnx.checker.check_model(model)
    floats = run(prepared.model, x=X)["y"]
    np.testing.assert_array_equal(run(model, x=X, **switches.rounding([]))["y"], floats)
    others = [run(model, x=X, **switches.rounding([k]))["y"] for k in range(len(names))]
    assert all(not np.array_equal(other, floats) for other in others)


def test_a_selected_quantizer_rounds_as_in_the_quantized_model(case):
    """Of the input, whose quantizer comes first, and of the weight of the last layer."""
    prepared, _, quantized, _ = case
    switches = switched(prepared.graph, quantized)
    model, names = switches
    assert len(set(names)) == len(names)
    scale, zero = (
        onnx.numpy_helper.to_array(next(t for t in quantized.graph.initializer if t.name == f"x_{what}"))
        for what in ("scale", "zero_point")
    )
    limits = np.iinfo(zero.dtype)
    codes = np.clip(np.rint(X / scale) + zero, limits.min, limits.max)
    rounded = ((codes - zero) * scale).astype(np.float32)
    expected = run(prepared.model, x=rounded)["y"]
    np.testing.assert_allclose(run(model, x=X, **switches.rounding([names.index("x")]))["y"], expected, rtol=1e-5)


def test_costs_add_up_to_that_of_the_quantized_model(case):
    prepared, _, quantized, _ = case
    costs = quantizer_costs(prepared.graph, quantized, [{"x": X[k : k + 1]} for k in range(8)])
    floats, found = (run(model, x=X)["y"] for model in (prepared.model, quantized))
    noise = np.mean([((a - b) ** 2).sum() / (a**2).sum() for a, b in zip(floats, found, strict=True)])
    assert abs(10 * np.log10(sum(costs.values()) / noise)) < 4
    assert all(cost > 0 for cost in costs.values())


def test_the_worst_layer_is_left_out_first():
    """With one scale for a weight whose channels differ, rounding it costs most."""
    prepared = prepare(network(spread=3.0))
    calibration = calibrate(prepared, [X], criterion="max")
    costs = dict.fromkeys([*calibration.thresholds, *(node.name for node in prepared.graph.nodes)], 1e-6)
    ranking = rank_layers(prepared.graph, calibration.thresholds, "tensorrt", (), costs | {"r": 1.0}, min_int8=0.0)
    without = quantize(prepared, calibration, engine="tensorrt", exclude=ranking[0])
    assert "r" not in without.thresholds


@pytest.mark.parametrize(("cost", "first"), [(0.3, ("conv2",)), (0.6, ("r", "a"))])
def test_the_ranking_weighs_noise_against_layers(cost, first):
    """Without the second layer r is not quantized, and without the first one x is not: 1 / 2, or (1 + cost) / 3."""
    prepared = prepare(network())
    calibration = calibrate(prepared, [X], criterion="max")
    costs = dict.fromkeys(calibration.thresholds, 0.0) | {"r": 1.0, "x": cost}
    ranking = rank_layers(prepared.graph, calibration.thresholds, "openvino", (), costs, min_int8=0.0)
    assert ranking[0] == first


@pytest.mark.parametrize("scaling", ["Div (m, six)", "Mul (m, sixth)", "Mul (sixth, m)"])
def test_a_tensor_is_left_out_with_its_multiples(scaling):
    """The rewritten HardSwish has one quantizer for both; without the first one alone, the second would get it."""
    body = f"""
        a = Conv <pads = [1, 1, 1, 1]> (x, w1)
        p = Add (a, three)
        k = Clip (p, zero, six)
        m = Mul (a, k)
        h = {scaling}
        c = Conv <pads = [1, 1, 1, 1]> (h, w2)
        y = GlobalAveragePool (c)
    """
    numbers = {"zero": 0, "three": 3, "six": 6, "sixth": 1 / 6}
    scalars = {name: np.array(value, np.float32) for name, value in numbers.items() if name in body}
    model = build("float[n, 3, 8, 8] x", "float[n, 4, 1, 1] y", body, w1=(4, 3, 3, 3), w2=(4, 4, 3, 3), **scalars)
    prepared = prepare(model)
    calibration = calibrate(prepared, [X], criterion="max")
    assert {"m", "h"} & place(prepared, calibration, "onnxruntime").grids.keys() == {"m"}
    costs = dict.fromkeys(calibration.thresholds.keys() - {"h"}, 0.0) | {"m": 1.0}
    first, *_ = rank_layers(prepared.graph, calibration.thresholds, "onnxruntime", (), costs, min_int8=0.0)
    assert not {"m", "h"} & place(prepared, calibration, "onnxruntime", first).grids.keys()


def test_a_quotient_is_no_multiple_of_its_divisor():
    body = "p = Mul (x, two) q = Div (two, x) r = Mul (x, three) y = Add (q, r)"
    constants = {"two": np.array(2, np.float32), "three": np.ones((3, 1, 1), np.float32)}
    graph = prepare(build("float[n, 3, 8, 8] x", "float[n, 3, 8, 8] y, float[n, 3, 8, 8] p", body, **constants)).graph
    assert [unscaled(graph, name) for name in ("p", "q", "r")] == ["x", "q", "r"]


def test_the_ranking_leaves_enough_layers():
    prepared = prepare(network())
    calibration = calibrate(prepared, [X], criterion="max")
    costs = dict.fromkeys(calibration.thresholds, 1.0)
    for min_int8, number in ((0.0, 3), (0.5, 1), (0.9, 0)):
        ranking = rank_layers(prepared.graph, calibration.thresholds, "openvino", (), costs, min_int8=min_int8)
        skipped = (
            {}
            if not ranking
            else quantize(
                prepared, calibration, engine="openvino", exclude=[name for names in ranking for name in names]
            ).skipped
        )
        assert len(skipped) == number


def test_the_table_has_the_most_harmful_first(case):
    prepared, calibration, quantized, engine = case
    found = sensitivity(prepared, calibration, [X], engine=engine)
    costs = quantizer_costs(prepared.graph, quantized, [{"x": X[:4]}])
    decibels = [one.sqnr_db for one in found.costs]
    assert decibels == sorted(decibels)
    assert {one.name: one.sqnr_db for one in found.costs} == pytest.approx(
        {name: -10 * np.log10(cost) for name, cost in costs.items()}
    )
    assert found.expected_sqnr_db == pytest.approx(-10 * np.log10(sum(costs.values())))
    assert json.loads(found.as_json())["costs"][0]["name"] == found.costs[0].name
    assert "<td" in found._repr_html_()
    with pytest.raises(klquant.InvalidInputError, match="at least one batch"):
        sensitivity(prepared, calibration, [], engine=engine)


def test_tables_of_embeddings_are_rounded_always():
    body = "e = Gather(t, i) a = MatMul(e, w1) r = Relu(a) y = MatMul(r, w2)"
    prepared = prepare(build("int64[n] i", "float[n, 4] y", body, t=(5000, 16), w1=(16, 8), w2=(8, 4)))
    data = {"i": np.arange(64)}
    quantized = quantize(prepared, calibrate(prepared, [data]), engine="onnxruntime").model
    switches = switched(prepared.graph, quantized)
    model, names = switches
    floats, found = run(prepared.model, **data)["y"], run(model, **data, **switches.rounding([]))["y"]
    assert names
    assert 0 < np.abs(floats - found).max() < 0.05 * np.abs(floats).max()
