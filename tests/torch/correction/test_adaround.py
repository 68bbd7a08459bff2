import copy

import numpy as np
import pytest
import torch
from torch import nn

from klquant.backends import rounding
from klquant.backends.torch import Quantizer, auto, fake_quantize, quantize
from klquant.backends.torch.correction import adaround
from klquant.backends.torch.correction.adaround import _patches
from klquant.backends.torch.model.layers import channel_axis, inner_layer
from klquant.errors import InvalidInputError
from support.networks import batch, mlp, outputs, ready

LAYERS = {
    "Linear": (nn.Linear(12, 6), (12,)),
    "Linear on sequences": (nn.Linear(12, 6, bias=False), (5, 12)),
    "Conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (4, 9)),
    "Conv1d same": (nn.Conv1d(4, 6, 3, padding="same"), (4, 9)),
    "Conv2d grouped": (nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=1), (4, 9, 7)),
    "Conv2d depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding=(1, 0)), (4, 6, 6)),
    "Conv2d reflect": (nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), (4, 6, 6)),
    "Conv3d": (nn.Conv3d(4, 6, 2, stride=(1, 2, 1)), (4, 4, 4, 4)),
}


def correlated(*shape, seed=0):
    """Draw inputs whose elements have much in common."""
    return batch(*shape, seed=seed) + 3 * batch(shape[0], *(1 for _ in shape[1:]), seed=seed + 1)


@pytest.mark.parametrize("case", LAYERS)
def test_the_layer_is_a_product_of_its_patches_and_weights(case):
    layer, shape = LAYERS[case]
    layer, x = copy.deepcopy(layer).double(), batch(3, *shape).double()
    rows = _patches(layer, x)
    weights = layer.weight.reshape(len(rows), -1, rows.shape[2])
    found = torch.einsum("gpi,goi->pgo", rows, weights).reshape(rows.shape[1], -1)
    bias = 0 if layer.bias is None else layer.bias
    axis = channel_axis(layer)
    wanted = layer(x).movedim(-1 if axis is None or isinstance(layer, nn.Linear) else 1, -1).reshape(len(found), -1)
    torch.testing.assert_close(found + bias, wanted)


@pytest.mark.parametrize("case", LAYERS)
def test_outputs_change_less_than_by_rounding_to_nearest(case):
    layer, shape = LAYERS[case]
    model, data = ready(nn.Sequential(copy.deepcopy(layer))), [correlated(64, *shape, seed=seed) for seed in (0, 5)]
    nearest, found = (quantize(model, data, adaround=one, progress=False) for one in (False, True))
    weights = [inner_layer(one.model[0].layer).weight for one in (nearest, found)]
    scale = found.weight_scales["0"]
    codes = [one / scale.reshape(-1, *[1] * (one.ndim - 1)) for one in weights]
    assert torch.equal(*(one.round() for one in codes)) is False
    assert (codes[0] - codes[1]).abs().max() < 1.01
    again = fake_quantize(weights[1], scale, axis=channel_axis(layer))
    torch.testing.assert_close(again, weights[1], rtol=1e-6, atol=0)
    x = correlated(64, *shape, seed=9)

    def error(weight):
        other = copy.deepcopy(model)
        other[0].weight = nn.Parameter(weight)
        return float(torch.square(other(x) - model(x)).sum().detach())

    assert error(weights[1]) < 0.9 * error(weights[0])


def test_the_rounding_is_exported(tmp_path):
    pytest.importorskip("onnxruntime")
    import onnxruntime

    from klquant.backends.torch import export_onnx, saturate_like_engines

    data = [correlated(32, 4, 8, 8, seed=seed).float() for seed in range(2)]
    net = ready(nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), dtype=torch.float32)
    found = quantize(net, data, adaround=True, progress=False)
    export_onnx(found, data[0], tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: data[0].numpy()})
    wanted = saturate_like_engines(found.model)(data[0]).detach().numpy()
    assert np.abs(got - wanted).max() < 0.02 * np.abs(wanted).max()
    assert np.sqrt(np.square(got - wanted).mean()) < 1e-3 * np.abs(wanted).max()


def test_layers_with_too_many_inputs_and_transposed_ones_keep_the_nearest_levels(monkeypatch):
    monkeypatch.setattr(adaround, "MAX_INPUTS", 20)
    net = ready(nn.Sequential(nn.Conv2d(4, 2, 3), nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 4, 2)))
    data = [correlated(8, 4, 8, 8)]
    nearest, found = (quantize(net, data, adaround=one, progress=False).model for one in (False, True))
    same = [torch.equal(a.layer.weight, b.layer.weight) for a, b in zip(nearest, found, strict=True)]
    assert same == [True, False, True]


def test_layers_are_done_in_portions_with_the_same_result(monkeypatch):
    net, data = mlp(torch.float64), [correlated(16, 4)]
    whole = quantize(net, data, adaround=True, progress=False).model
    monkeypatch.setattr(rounding, "AT_ONCE", 1)
    assert outputs(quantize(net, data, adaround=True, progress=False).model, data[0]).equal(outputs(whole, data[0]))


def test_a_quantizer_rounds_a_copy():
    net, data = ready(nn.Sequential(nn.Linear(12, 6))), [correlated(64, 12)]
    quantizer = Quantizer(net, progress=False)
    quantizer._collect(data[0], data, equalize=False)
    quantizer.search_thresholds()
    start = quantizer.simulate()
    before = start.model[0].layer.weight.clone()
    found = quantizer.adapt_rounding(start, data)
    assert start.model[0].layer.weight.equal(before)
    assert not found.model[0].layer.weight.equal(before)
    with pytest.raises(InvalidInputError, match="at least one batch to round weights by"):
        quantizer.adapt_rounding(start, [])
    with pytest.raises(InvalidInputError, match="layer `0`, batch 0: activations must be finite"):
        quantizer.adapt_rounding(start, [data[0] * float("inf")])


def test_automatic_tries_it():
    net, data = ready(nn.Sequential(nn.Linear(12, 6))), [correlated(64, 12, seed=seed) for seed in range(8)]
    found = auto(net, data, progress=False, target="200dB")
    before = max(one.sqnr_db for one in found.attempts if not one.recipe.steps)
    assert next(one.sqnr_db for one in found.attempts if one.recipe.steps == ("adaround",)) > before + 0.1


def test_data_that_cannot_be_read_again_are_refused():
    with pytest.raises(InvalidInputError, match="adaround"):
        quantize(mlp(torch.float64), iter([batch(4, 4)]), passes=1, adaround=True, progress=False)
