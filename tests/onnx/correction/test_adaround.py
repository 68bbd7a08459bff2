import numpy as np
import pytest

import klquant
from klquant.backends.onnx import calibrate, prepare, quantize
from klquant.backends.onnx.correction.adaround import adapt_rounding
from klquant.backends.onnx.correction.parameters import with_parameters
from klquant.backends.onnx.correction.patches import as_rows, from_rows, sample_inputs
from klquant.backends.onnx.model.graph import to_array
from support.onnx_models import build, run

RNG = np.random.default_rng(0)


def correlated(shape):
    """Return images whose neighbours and channels are alike, as in real ones."""
    noise = RNG.normal(size=shape)
    return (noise.cumsum(axis=1).cumsum(axis=-1) / 5).astype(np.float32)


LAYERS = {
    "conv": ("Conv <pads = [1, 0, 2, 1], strides = [2, 1], dilations = [1, 2]>", (6, 4, 3, 2), (3, 4, 9, 8)),
    "same": ('Conv <auto_pad = "SAME_UPPER", strides = [2, 2]>', (6, 4, 3, 3), (3, 4, 9, 8)),
    "same lower": ('Conv <auto_pad = "SAME_LOWER", strides = [3, 2]>', (6, 4, 2, 3), (3, 4, 9, 8)),
    "valid": ('Conv <auto_pad = "VALID">', (6, 4, 3, 3), (3, 4, 9, 8)),
    "depthwise": ("Conv <group = 4, pads = [1, 1, 1, 1]>", (8, 1, 3, 3), (3, 4, 9, 8)),
    "groups": ("Conv <group = 2>", (6, 2, 3, 3), (3, 4, 9, 8)),
    "1-d": ("Conv <pads = [1, 1]>", (6, 4, 3), (3, 4, 9)),
    "Gemm": ("Gemm", (4, 6), (9, 4)),
    "Gemm, transposed": ("Gemm <transB = 1>", (6, 4), (9, 4)),
    "MatMul": ("MatMul", (4, 6), (3, 5, 4)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_rows_times_inputs_are_the_outputs_of_the_layer(kind):
    call, weight, shape = LAYERS[kind]
    dims = ", ".join(map(str, shape))
    head, _, attributes = call.partition(" ")
    model = prepare(build(f"float[{dims}] x", "float y", f"y = {head} {attributes} (x, w)", w=weight))
    node, x = model.graph.nodes[0], correlated(shape)
    rows = as_rows(model.graph, node)
    inputs = sample_inputs(node, rows, x, 1)
    found = np.concatenate([part @ one.T for part, one in zip(inputs, rows.values, strict=True)], axis=1)
    exact = run(model.model, x=x)["y"]
    by_position = np.moveaxis(exact, 1, -1) if head == "Conv" else exact
    np.testing.assert_allclose(found, by_position.reshape(-1, rows.outputs), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(from_rows(rows, rows.values), to_array(model.graph.initializers["w"]))


def network():
    body = (
        "c = Conv <pads = [1, 1, 1, 1]> (x, w) r = Relu (c) p = GlobalAveragePool (r) f = Flatten (p) y = Gemm (f, v)"
    )
    return prepare(build("float[n, 4, 9, 9] x", "float[n, 3] y", body, w=(8, 4, 3, 3), v=(8, 3)))


def test_the_outputs_of_the_model_change_less_on_other_data():
    model, data = network(), [{"x": correlated((4, 4, 9, 9))} for _ in range(4)]
    quantized = quantize(model, calibrate(model, data), engine="openvino").model
    integers = {t.name: to_array(t) for t in quantized.graph.initializer}
    names = {node.name: node.input[1] for node in model.graph.nodes if node.op_type in ("Conv", "Gemm")}
    found = adapt_rounding(model, quantized, names, data)
    nearest = {}
    for name, weight in names.items():
        steps = integers[f"{weight}_scale"].reshape((-1, 1, 1, 1) if weight == "w" else (1, -1))
        nearest[name, 1] = (integers[f"{weight}_quantized"] * steps).astype(np.float32)
    x = correlated((16, 4, 9, 9))
    exact = run(model.model, x=x)["y"]
    ours, theirs = (np.mean((run(with_parameters(model, w).model, x=x)["y"] - exact) ** 2) for w in (found, nearest))
    assert ours < 0.5 * theirs


def test_weights_keep_their_scales_and_stay_next_to_their_values():
    model, data = network(), [correlated((4, 4, 9, 9))]
    calibration = calibrate(model, data)
    found = [quantize(model, calibration, engine="openvino", batches=data, adaround=one).model for one in (True, False)]
    ours, nearest = ({t.name: to_array(t) for t in one.graph.initializer} for one in found)
    np.testing.assert_array_equal(ours["w_scale"], nearest["w_scale"])
    difference = np.abs(ours["w_quantized"].astype(int) - nearest["w_quantized"])
    assert set(np.unique(difference)) == {0, 1}


def test_layers_that_share_a_weight_keep_it():
    body = "a = Conv (x, w) b = Conv (a, w) y = Conv (b, v)"
    model = prepare(build("float[n, 4, 9, 9] x", "float[n, 4, 9, 9] y", body, w=(4, 4, 1, 1), v=(4, 4, 1, 1)))
    data = [{"x": correlated((4, 4, 9, 9))}]
    quantized = quantize(model, calibrate(model, data), engine="openvino").model
    found = adapt_rounding(model, quantized, [node.name for node in model.graph.nodes], data)
    assert [name for name, _ in found] == [model.graph.nodes[2].name]


def test_large_batches_are_taken_in_part(monkeypatch):
    model, data = network(), [{"x": correlated((4, 4, 9, 9))}]
    quantized = quantize(model, calibrate(model, data), engine="openvino").model
    monkeypatch.setattr("klquant.backends.onnx.correction.adaround.MOST_VALUES", 1)
    part = adapt_rounding(model, quantized, ["conv0"], data)
    assert np.array_equal(
        part["conv0", 1], adapt_rounding(model, quantized, ["conv0"], [{"x": data[0]["x"][:1]}])["conv0", 1]
    )


def test_layers_are_taken_in_portions(monkeypatch):
    model, data = network(), [{"x": correlated((4, 4, 9, 9))}]
    quantized = quantize(model, calibrate(model, data), engine="openvino").model
    names = [node.name for node in model.graph.nodes]
    whole = adapt_rounding(model, quantized, names, data)
    monkeypatch.setattr("klquant.backends.rounding.AT_ONCE", 1)
    parts = adapt_rounding(model, quantized, names, data)
    assert len(whole) == 2
    assert all(np.array_equal(parts[key], weight) for key, weight in whole.items())


def test_it_needs_batches():
    model = build("float[n, 4] x", "float[n, 3] y", "y = MatMul (x, w)", w=(4, 3))
    with pytest.raises(klquant.InvalidInputError, match="`adaround` needs `batches`"):
        quantize(model, {"x": 1.0}, adaround=True)
