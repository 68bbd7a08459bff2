"""A layer that is called on several tensors has a range for each call."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from klquant.backends.torch import Calibration, Quantizer, export_onnx, quantize, requantize, saturate_like_engines
from klquant.backends.torch.model.calls import Calls
from support.networks import Net, batch, is_same, outputs, ready

pytestmark = pytest.mark.filterwarnings("ignore:layer `[^`]*`. (T =|expected SQNR):klquant.errors.CalibrationWarning")
X = batch(4, 8, dtype=torch.float32)
OPTIONS = {"criterion": "max", "num_bins": 255}


def shared(times=(1.0, 0.02)):
    """Return a network that calls its head on tensors of different size."""
    return ready(Net(lambda net, x: [net.head(x * time) for time in times], head=nn.Linear(8, 8)), dtype=torch.float32)


def weight(model):
    return model.head.weight.detach()


def sqnr(expected, got):
    return float(10 * (expected.square().sum() / (got - expected).square().sum()).log10())


def test_each_call_has_a_range():
    model = shared()
    result = quantize(model, [X], **OPTIONS)
    amax = float(X.abs().max())
    assert {name: found.amax for name, found in result.thresholds.items()} == pytest.approx(
        {"head@0": amax, "head@1": amax * 0.02}
    )
    assert result.weight_scales.keys() == {"head"}
    assert result.calibration.calls == {"head@0": 1, "head@1": 1}
    for _ in range(2):  # each run starts at the first call
        for expected, got in zip(outputs(model, X), outputs(result.model, X), strict=True):
            assert sqnr(expected - model.head.bias.detach(), got - model.head.bias.detach()) > 35


def test_weights_are_rounded_once_and_not_where_all_calls_are_excluded():
    model = shared()
    both, one = quantize(model, [X], **OPTIONS), quantize(model, [X], exclude="head@1", **OPTIONS)
    assert is_same(weight(both.model), weight(one.model))
    assert not is_same(weight(both.model), weight(model))
    assert is_same(outputs(one.model, X)[0], outputs(both.model, X)[0])
    assert not is_same(outputs(one.model, X)[1], outputs(both.model, X)[1])
    model.add_module("other", nn.Linear(8, 8).eval())
    with pytest.warns(match="layer `other` stays"):
        none = quantize(model, [X], exclude="head", **OPTIONS)
    assert is_same(weight(none.model), weight(model))


def test_options_by_the_name_of_the_layer_hold_for_all_calls():
    result = quantize(shared(), [X], overrides={"head": {"num_bits": 5}}, **OPTIONS)
    assert {name: found.num_bits for name, found in result.thresholds.items()} == {"head@0": 5, "head@1": 5}


@pytest.mark.parametrize("observe", ["inputs", "outputs"])
def test_outputs_are_observed_for_each_call_as_well(observe):
    model = shared()
    result = quantize(model, [X], observe=observe, **OPTIONS)
    seen = [X, X * 0.02] if observe == "inputs" else outputs(model, X)
    assert [found.amax for found in result.thresholds.values()] == pytest.approx([float(x.abs().max()) for x in seen])


def test_a_loop_keeps_one_range():
    result = quantize(shared((1.0,) * 17), [X], **OPTIONS)
    assert list(result.thresholds) == ["head"]
    assert result.calibration.calls == {"head": 17}


def test_calls_are_counted_in_one_run_of_a_model_that_runs_several_times():
    """As in `generate`, which runs a model for each token."""

    def run(net, x):
        y = net.head(net.twice(net.twice(x))) + x
        return y @ y.mT @ x

    model = ready(Net(run, head=nn.Linear(8, 8), twice=nn.Linear(8, 8)), dtype=torch.float32)
    result = quantize(model, [X], forward=lambda net, x: net(net(x) / 100), engine="tensorrt", **OPTIONS)
    products = [f":matmul.{k}.{name}" for k in (0, 1) for name in ("input", "other")]
    assert result.thresholds.keys() == {"head", ":add.0.other", "twice@0", "twice@1", *products}
    assert set(result.calibration.calls.values()) == {2}


def test_other_numbers_of_calls_start_again_at_the_first():
    model = ready(Net(lambda net, x: [net.head(x) for _ in range(len(x))], head=nn.Linear(8, 8)), dtype=torch.float32)
    result = quantize(model, [X[:2], X, X[:1]], **OPTIONS)
    assert list(result.thresholds) == ["head@0", "head@1"]
    assert len(outputs(result.model, X)) == 4


def test_products_of_a_module_that_is_called_twice():
    inner = Net(lambda net, x: F.scaled_dot_product_attention(x, x, x))
    model = ready(Net(lambda net, x: net.inner(net.inner(x) * 50), inner=inner), dtype=torch.float32)
    result = quantize(model, [X], **OPTIONS)
    name = "inner:scaled_dot_product_attention.0.query"
    assert result.thresholds[f"{name}@1"].amax > 10 * result.thresholds[f"{name}@0"].amax
    assert len(result.thresholds) == 8


def test_a_relu_is_joined_with_every_call():
    model = ready(Net(lambda net, x: F.relu(net.head(F.relu(net.head(x)))), head=nn.Linear(8, 8)), dtype=torch.float32)
    result = quantize(model, [X], observe="outputs", **OPTIONS)
    assert [(fold.kind, fold.into) for fold in result.folds] == [("relu", "head")]
    assert all(outputs(result.model, X).flatten() >= 0)
    assert isinstance(result.model.head, Calls)


def test_a_saved_calibration_and_copies_do_the_same(tmp_path):
    model = shared()
    result = quantize(model, [X], **OPTIONS)
    result.calibration.save(tmp_path / "found.npz")
    again = requantize(model, Calibration.load(tmp_path / "found.npz"))
    expected = outputs(result.model, X)
    for twin in (again.model, copy.deepcopy(result.model)):
        assert all(map(is_same, outputs(twin, X), expected))


def test_biases_are_corrected_over_all_calls():
    """The correction is the mean error of the layer over both calls."""
    model = shared()
    corrected = quantize(model, [X], correct_bias=True, **OPTIONS).model
    plain = quantize(model, [X], **OPTIONS).model
    errors = [(a - b).mean(0) for a, b in zip(outputs(model, X), outputs(plain, X), strict=True)]
    expected = (errors[0] + errors[1]) / 2
    torch.testing.assert_close(corrected.head.bias - plain.head.bias, expected, rtol=1e-3, atol=1e-6)


def test_it_is_diagnosed_by_call_and_exported_with_a_range_for_each():
    quantizer = Quantizer(shared(), num_bins=255)
    quantizer.fold(X)
    quantizer.quantize_weights()
    quantizer.collect_amax([X])
    quantizer.collect_histograms([X])
    quantizer.search_thresholds(criterion="auto", batches=[X])
    assert {layer.name for layer in quantizer.diagnose([X]).layers} == {"head@0", "head@1"}


def test_the_exported_model_computes_the_same():
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    simulation = saturate_like_engines(quantize(shared(), [X], **OPTIONS).model)
    exported = export_onnx(simulation, X, dynamic_batch=False)
    assert exported.skipped == {}
    assert len(set(exported.thresholds.values())) == 2
    session = runtime.InferenceSession(exported.model.SerializeToString(), providers=["CPUExecutionProvider"])
    for got, expected in zip(session.run(None, {"input": X.numpy()}), outputs(simulation, X), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), expected)
