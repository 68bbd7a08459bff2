import numpy as np
import onnx
import pytest

import klquant
from klquant.backends.onnx import calibrate, prepare, quantize
from klquant.backends.onnx.correction import bias_correction
from klquant.backends.onnx.correction.biases import find_bias
from klquant.backends.onnx.correction.parameters import with_parameters
from klquant.backends.onnx.refinement import layer_choice
from support.onnx_models import array, build, run, run_all

ENGINES = ["tensorrt", "onnxruntime", "openvino"]
IMAGE = "float[n, 3, 8, 8] x"
rng = np.random.default_rng(0)
BATCHES = [rng.uniform(0, 1, (8, 3, 8, 8)).astype(np.float32) for _ in range(4)]
TEST = rng.uniform(0, 1, (16, 3, 8, 8)).astype(np.float32)


def low(*shape):
    """Return weights that are all rounded down, by almost half a step: they differ from steps of 1 / 127 by 0.45."""
    weight = (rng.integers(-20, 20, shape) + 0.45) / 127
    weight.reshape(len(weight), -1)[:, 0] = 1.0
    return weight.astype(np.float32)


def biased():
    return build(
        IMAGE, "float y", "a = Conv(x, w, b) r = Relu(a) y = Conv(r, v)", w=low(4, 3, 3, 3), b=(4,), v=low(2, 4, 3, 3)
    )


def error(model, quantized, x=TEST):
    return float(np.square(run(model, x=x)["y"] - run(quantized.model, x=x)["y"]).mean())


@pytest.fixture(autouse=True)
def unscaled(monkeypatch):
    """Leave the channels alone: scaled weights are not all rounded to one side."""
    monkeypatch.setattr(layer_choice, "SCALED", 0.0)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_error_falls_where_weights_are_rounded_to_one_side(engine):
    model = biased()
    calibration = calibrate(model, BATCHES, criterion="max")
    plain = quantize(model, calibration, engine=engine)
    corrected = quantize(model, calibration, engine=engine, batches=BATCHES)
    assert plain.corrections == {}
    assert list(corrected.corrections) == ["conv0", "conv2"]
    assert error(model, corrected) < error(model, plain) / 10


@pytest.mark.parametrize("inputs", [False, True])
def test_the_means_become_those_of_the_float_model(monkeypatch, inputs):
    monkeypatch.setattr(bias_correction, "output_errors", lambda *_, **__: [1.0, float(inputs), float(not inputs)])
    model = biased()
    quantized = quantize(model, calibrate(model, BATCHES, criterion="max"), engine="tensorrt", batches=BATCHES)
    exact, found = (run_all(one, x=np.concatenate(BATCHES)) for one in (model, quantized.model))
    for name in ("a", "y"):
        shift = (exact[name] - found[name]).mean((0, 2, 3))
        largest = np.abs(exact[name] - found[name]).max()
        assert np.abs(shift).max() < largest / (50 if inputs else 10), name


def test_the_correction_is_the_mean_of_what_rounded_weights_lose(monkeypatch):
    monkeypatch.setattr(bias_correction, "output_errors", lambda *_, **__: [1.0, 0.0, 1.0])  # the same inputs for both
    model = build(IMAGE, "float y", "y = Conv(x, w, b)", w=low(4, 3, 3, 3), b=(4,))
    calibration = calibrate(model, BATCHES, criterion="max")
    plain = quantize(model, calibration, engine="tensorrt")
    corrected = quantize(model, calibration, engine="tensorrt", batches=BATCHES, adaround=False)
    x = run_all(plain.model, x=np.concatenate(BATCHES))["x_dequantized"]
    lost = (run(model, x=x)["y"] - run(plain.model, x=x)["y"]).mean((0, 2, 3))
    np.testing.assert_allclose(array(corrected.model, "b") - array(model, "b"), lost, rtol=1e-3, atol=1e-6)
    assert corrected.corrections == {"conv0": pytest.approx(np.abs(lost).max(), rel=1e-3)}


def test_nothing_changes_where_other_data_do_not_agree():
    """In the second half of the data other channels of the input are in use."""
    model = biased()
    first, second = (np.zeros_like(BATCHES[0]) for _ in range(2))
    first[:, :1], second[:, 1:] = BATCHES[0][:, :1], -BATCHES[0][:, 1:]
    calibration = calibrate(model, [first, second], criterion="max")
    plain = quantize(model, calibration, engine="tensorrt")
    for correct_bias, changed in ((None, False), (False, False), (True, True)):
        options = {"batches": [first, second], "adaround": False, "correct_bias": correct_bias}
        found = quantize(model, calibration, engine="tensorrt", **options)
        assert (found.model != plain.model, bool(found.corrections)) == (changed, changed)


def test_one_batch_is_halved_and_one_sample_corrects_only_on_demand():
    model = biased()
    calibration = calibrate(model, BATCHES, criterion="max")

    def corrections(x, **options):
        return quantize(model, calibration, engine="tensorrt", batches=[x], adaround=False, **options).corrections

    assert corrections(BATCHES[0])
    assert not corrections(BATCHES[0][:1])
    assert corrections(BATCHES[0][:1], correct_bias=True)


def test_batches_of_any_size_count_by_their_values():
    model = biased()
    calibration = calibrate(model, BATCHES, criterion="max")
    joined = np.concatenate(BATCHES)
    first = quantize(model, calibration, engine="tensorrt", batches=[joined[:16], joined[16:]], correct_bias=True)
    other = quantize(model, calibration, engine="tensorrt", batches=[joined[:2], joined[2:]], correct_bias=True)
    np.testing.assert_allclose(array(first.model, "b"), array(other.model, "b"), atol=1e-4)


def test_products_are_corrected_in_the_sum_behind_them():
    model = build("float[n, 5, 8] x", "float y", "p = MatMul(x, w) y = Add(b, p)", w=low(8, 8).T.copy(), b=(8,))
    data = [batch[:, 0, :5] for batch in BATCHES]
    calibration = calibrate(model, data, criterion="max")
    plain = quantize(model, calibration, engine="onnxruntime")
    corrected = quantize(model, calibration, engine="onnxruntime", batches=data, adaround=False)
    assert list(corrected.corrections) == ["matmul0"]
    assert error(model, corrected, data[0]) < error(model, plain, data[0]) / 4


@pytest.mark.parametrize(
    ("body", "w", "expected"),
    [
        ("y = Conv(x, w)", (4, 3, 3, 3), (2, 4, 2)),
        ("y = ConvTranspose<group = 3>(x, w)", (3, 2, 3, 3), (2, 6, 2)),
        ("s = ReduceMean<axes = [0, 2, 3], keepdims = 0>(x) y = Conv(x, w, s)", (3, 3, 3, 3), None),  # not a constant
        ("f = Flatten(x) y = Gemm(f, w)", (192, 5), (2, 5, 0)),
        ("f = Flatten(x) y = Gemm<transB = 1>(f, w)", (5, 192), (2, 5, 0)),
        ("f = Flatten(x) y = Gemm<beta = 0.5>(f, w)", (192, 5), None),
        ("y = MatMul(x, w)", (8, 5), None),
        ("p = MatMul(x, w) y = Add(p, p)", (8, 5), None),
        ("p = MatMul(x, w) y = Add(p, c)", (8, 5), None),  # one value for each row
    ],
)
def test_which_biases_can_be_changed(body, w, expected):
    graph = prepare(build(IMAGE, "float y", body, w=w, c=(8, 1))).graph
    layer = next(node for node in graph.nodes if "w" in node.input)
    found = find_bias(graph, layer)
    assert (found and (found.position, len(found.values), found.spatial)) == expected


def test_half_precision():
    x = "float16[n, 3, 8, 8] x"
    half = {"w": low(4, 3, 3, 3).astype(np.float16), "b": np.zeros(4, np.float16)}
    model = build(x, "float16 y", "y = Conv(x, w, b)", opset=19, **half)
    data = [batch.astype(np.float16) for batch in BATCHES]
    calibration = calibrate(model, data, criterion="max")
    found = quantize(model, calibration, engine="tensorrt", batches=data, adaround=False)
    assert array(found.model, "b").dtype == np.float16
    assert found.corrections["conv0"] > 0


def test_a_large_correction_still_fits_the_integers_of_the_bias():
    model = build(IMAGE, "float y", "y = Conv(x, w, b)", w=low(4, 3, 3, 3) * 1e-6, b=np.full(4, 100.0, np.float32))
    calibration = calibrate(model, BATCHES, criterion="max")
    with pytest.warns(klquant.CalibrationWarning, match="biases far above"):
        found = quantize(model, calibration, engine="onnxruntime", batches=BATCHES, correct_bias=True)
    assert found.verification.wrong == []


@pytest.mark.parametrize(("options", "message"), [({}, "needs `batches`"), ({"batches": []}, "at least one batch")])
def test_data_must_be_given(options, message):
    model = biased()
    with pytest.raises(klquant.InvalidInputError, match=message):
        quantize(model, calibrate(model, BATCHES, criterion="max"), correct_bias=True, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"min_int8": 1.0}, "layer `conv0` must be finite"), ({}, "`r`, batch 0: values must be fini")],
)
def test_values_that_are_not_finite_are_an_error(options, message):
    model = biased()
    bad = np.full_like(BATCHES[0], np.nan)
    with pytest.raises(klquant.InvalidInputError, match=message):
        quantize(model, calibrate(model, BATCHES, criterion="max"), batches=[bad, bad], **options)


def test_a_batch_that_does_not_fit_is_named():
    model = biased()
    with pytest.raises(klquant.InvalidInputError, match="batch 1: input `x` must have shape"):
        quantize(model, calibrate(model, BATCHES, criterion="max"), batches=[BATCHES[0], BATCHES[0][..., :3]])


def test_other_readers_of_a_constant_keep_it():
    body = """a = Conv(x, w, b) y = Conv(x, w, b)
              z = If (c) <then_branch = one () => (float[4] t) { t = Where(c, d, b) },
                          else_branch = two () => (float[4] e) { e = Where(c, d, b) }>
              k = Conv(x, w, d)"""
    model = build(f"{IMAGE}, bool c", "float a, float y, float[4] z, float k", body, w=(4, 3, 3, 3), b=(4,), d=(4,))
    prepared = prepare(model)
    shifted = {("conv0", 2): np.ones(4, np.float32), ("conv3", 2): np.zeros(4, np.float32)}
    changed = with_parameters(prepared, shifted)
    feeds = {"x": TEST[:1]}
    for flag in (False, True):
        before, after = (run(one, c=np.array(flag), **feeds) for one in (model, changed.model))
        np.testing.assert_array_equal(before["y"], after["y"])
        np.testing.assert_array_equal(before["z"], after["z"])
    assert prepared.model == prepare(model).model
    onnx.checker.check_model(changed.model)
    assert changed.graph.initializers.keys() == {tensor.name for tensor in changed.model.graph.initializer}
