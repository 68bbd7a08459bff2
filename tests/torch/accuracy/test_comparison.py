import math

import numpy as np
import pytest
import torch
from torch import nn

import klquant
from klquant.backends.accuracy.sums import Sums
from klquant.backends.torch import LayerThreshold, quantize_weights
from klquant.backends.torch.accuracy.comparison import SwitchableModel, compare, each_call, fake_quantize_at
from support.networks import Broken, Net, batch, fingerprint, is_same, num_hooks, outputs, ready

X = batch(5, 4)


def clipping(value):
    return LayerThreshold(value, value, math.nan, 0.0)


# --- sums ---


def test_sums_by_hand():
    sums = compare(torch.tensor([[3.0, -4.0]]), torch.tensor([[3.0, -3.0]]))
    assert sums == (25.0, 1.0, 21.0, 18.0)
    assert sums.sqnr_db == 10 * math.log10(25)
    assert sums.cosine == pytest.approx(21 / 5 / math.sqrt(18), rel=1e-15)


def test_sums_of_parts_add_up():
    x, y = torch.arange(6.0), torch.arange(6.0).flip(0)
    assert compare(x[:2], y[:2]).plus(compare(x[2:], y[2:])) == compare(x, y)
    assert Sums().plus(compare(x, y)) == compare(x, y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_sums_are_float64(dtype):
    x = torch.full((3000,), 1.1, dtype=dtype)
    one = float(x[0])
    assert compare(x, 2 * x).signal == pytest.approx(3000 * one * one, rel=1e-13)


@pytest.mark.parametrize(
    ("sums", "sqnr_db", "cosine"),
    [
        (Sums(4.0, 0.0, 4.0, 4.0), math.inf, 1.0),
        (Sums(0.0, 4.0, 0.0, 4.0), -math.inf, math.nan),
        (Sums(4.0, 4.0, 0.0, 0.0), 0.0, math.nan),
        (Sums(), math.nan, math.nan),
    ],
)
def test_limits_have_their_values(sums, sqnr_db, cosine):
    assert (sums.sqnr_db, sums.cosine) == pytest.approx((sqnr_db, cosine), nan_ok=True)


def test_only_a_reference_that_is_not_finite_is_left_out():
    x = torch.tensor([3.0, torch.inf, torch.nan, -torch.inf, 1.0])
    assert compare(x, torch.tensor([3.0, 7.0, 7.0, torch.nan, 0.0])) == (10.0, 1.0, 9.0, 9.0)
    assert math.isnan(compare(torch.ones(2), torch.tensor([1.0, torch.nan])).noise)


def test_comparing_takes_part_in_no_gradient():
    x = torch.ones(3, requires_grad=True)
    assert compare(x, 2 * x).noise == 3.0
    assert x.grad is None


def test_an_activation_is_quantized_at_the_threshold_of_its_layer():
    expected = klquant.fake_quantize(X.numpy(), float(np.float32(1.7 / 127)))
    assert np.array_equal(fake_quantize_at(X, clipping(1.7)).numpy(), expected)


# --- hooks ---


def test_each_call_is_reported_and_can_be_repeated():
    """Also with further arguments, and an input given by keyword."""
    up = ready(nn.ConvTranspose1d(2, 2, 3, stride=2))
    model = Net(lambda net, x: (net.up(x, output_size=[8]), net.up(x, [8]), net.up(input=x)), up=up)
    x, calls = batch(1, 2, 3), []
    with each_call({"given": up}, calls.append):
        results = outputs(model, x)
    assert [call.layer for call in calls] == ["given"] * 3
    assert all(call.input is x for call in calls)
    assert [call.output.shape[-1] for call in calls] == [8, 8, 7]
    for call, result in zip(calls, results, strict=True):
        assert call.output is result
        assert torch.equal(call.again(up, x), result)
        assert call.again(up, 2 * x).shape == result.shape
    assert len(calls) == 3
    assert num_hooks(model) == 0


def test_hooks_come_off_after_an_exception():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    before = fingerprint(model)

    def observer(call):
        raise Broken

    with pytest.raises(Broken), each_call(dict(model.named_children()), observer):
        outputs(model, X.float())
    with pytest.raises(AttributeError), each_call({"0": model[0], "1": None}, observer):
        pass
    assert fingerprint(model) == before


# --- switching ---


@pytest.mark.parametrize("observe", ["inputs", "outputs"])
def test_layers_switch_to_int8_and_back(observe):
    model = ready(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 4))))
    thresholds = {"0": clipping(1.0), "2.0": clipping(0.5)}
    before = fingerprint(model)
    switchable = SwitchableModel(model, quantize_weights(model), thresholds, observe)
    scales = quantize_weights(model)

    def expected(names):
        chosen = {name: thresholds[name] for name in names}
        return outputs(SwitchableModel(model, scales, chosen, observe).quantizing(chosen), X)

    seen = [outputs(switchable.quantizing(names), X) for names in ((), {"0"}, thresholds, {"2.0"}, (), thresholds)]
    for got, names in zip(seen, ((), {"0"}, thresholds, {"2.0"}, (), thresholds), strict=True):
        assert is_same(got, expected(names))
    assert is_same(seen[0], outputs(model, X))
    assert len({tensor.numpy().tobytes() for tensor in seen}) == 4
    assert fingerprint(model) == before


def test_the_layers_in_floating_point_are_those_of_the_model():
    model = ready(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    switchable = SwitchableModel(model, quantize_weights(model), {"1": clipping(1.0)}, "inputs")
    result = switchable.quantizing(())
    assert result is not model
    assert result[1] is model[1] is switchable.floats["1"]
    assert switchable.quantizing({"1"})[1] is switchable.quantized["1"] is not model[1]
    assert result[0] is not model[0]  # it has no threshold and is never switched
