import json

import pytest
import torch
from torch import nn

from klquant.backends.torch import LayerThreshold, collect_amax, fake_quantize, fold_relu, quantize_weights, simulate
from klquant.backends.torch.correction.bias_correction import correct_bias
from klquant.backends.torch.model.layers import inner_layer
from klquant.errors import InvalidInputError
from support.networks import Broken, Net, batch, fingerprint, is_same, mlp, num_hooks, outputs, ready

LAYERS = {
    "Linear": (nn.Linear(4, 6), (4,)),
    "Linear without bias": (nn.Linear(4, 6, bias=False), (4,)),
    "Linear on sequences": (nn.Linear(4, 6), (5, 4)),
    "Conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (4, 9)),
    "Conv2d grouped": (nn.Conv2d(4, 6, 3, groups=2, dilation=2), (4, 9, 7)),
    "Conv2d depthwise without bias": (nn.Conv2d(4, 4, 3, groups=4, bias=False), (4, 6, 6)),
    "Conv2d circular": (nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular"), (4, 6, 6)),
    "Conv2d reflect": (nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), (4, 6, 6)),
    "Conv3d": (nn.Conv3d(4, 6, 2), (4, 4, 4, 4)),
    "ConvTranspose1d": (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (4, 6)),
    "ConvTranspose2d grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2, padding=1), (4, 6, 6)),
}


def quantized(model, data, *, observe="inputs", share=0.4):
    """Simulate a model, its thresholds at a share of amax, so that the roundings have a mean far from 0."""
    amax = collect_amax(model, data, observe=observe)
    thresholds = {name: LayerThreshold(value, share * value, float("nan"), 0.0) for name, value in amax.items()}
    return simulate(model, quantize_weights(model), thresholds, observe=observe)


def skewed(*shape, seed=0):
    """Draw a batch whose clipping shifts its mean."""
    return batch(*shape, seed=seed).exp()


def shift_by_hand(layer, simulated, x, *, observe="inputs"):
    """Return mean(W x - W_hat x_hat) of each output channel, from the outputs without bias, sample by sample."""
    rounded = fake_quantize(x, simulated.scale) if observe == "inputs" else x
    outs = []
    for each, value in ((layer, x), (inner_layer(simulated.layer), rounded)):
        y = torch.stack([outputs(each, sample[None])[0] for sample in value])
        axis = -1 if isinstance(layer, nn.Linear) else 1
        y = y.movedim(axis, -1).flatten(0, -2)
        outs.append(y if each.bias is None else y - each.bias.detach())
    return (outs[0] - outs[1]).mean(0)


@pytest.mark.parametrize("observe", ["inputs", "outputs"])
@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)
def test_the_mean_difference_goes_into_the_bias(layer, shape, observe):
    ready(layer)
    x = skewed(12, *shape)
    simulated = quantized(layer, [x], observe=observe)
    corrected, corrections = correct_bias(simulated, layer, x.split(5))
    shift = shift_by_hand(layer, simulated, x, observe=observe)
    old = torch.zeros_like(shift) if layer.bias is None else layer.bias.detach()
    assert shift.abs().max() > 1e-3
    torch.testing.assert_close(corrected.layer.bias.detach() - old, shift, rtol=1e-10, atol=1e-12)
    assert corrections == {"": pytest.approx(float(shift.abs().max()), rel=1e-10)}


def test_afterwards_no_channel_is_shifted():
    model = nn.Conv2d(4, 6, 3, bias=False)
    ready(model)
    x = skewed(12, 4, 6, 6)
    simulated = quantized(model, [x])
    corrected, _ = correct_bias(simulated, model, [x])
    before, after = ((outputs(m, x) - outputs(model, x)).mean((0, 2, 3)).abs().max() for m in (simulated, corrected))
    assert before > 0.1
    assert after < 1e-12


def test_a_layer_is_corrected_before_its_relu():
    model, _ = fold_relu(ready(nn.Sequential(nn.Linear(4, 6), nn.ReLU())), batch(2, 4))
    x = skewed(20, 4)
    simulated = quantized(model, [x])
    corrected, _ = correct_bias(simulated, model, [x])
    layer = inner_layer(model[0])
    assert layer is not model[0]
    shift = shift_by_hand(layer, simulated.get_submodule("0"), x)
    torch.testing.assert_close(inner_layer(corrected[0].layer).bias - layer.bias, shift, rtol=1e-10, atol=1e-12)


def test_each_layer_gets_the_input_that_it_has_in_floating_point():
    model = ready(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))
    x = skewed(20, 4)
    simulated = quantized(model, [x])
    corrected, corrections = correct_bias(simulated, model, [x])
    shift = shift_by_hand(model[2], simulated[2], outputs(model[:2], x))
    torch.testing.assert_close(corrected[2].layer.bias - model[2].bias, shift, rtol=1e-10, atol=1e-12)
    assert list(corrections) == ["0", "2"]


def test_calls_of_one_layer_are_joined():
    model = ready(Net(lambda net, x, y: net.fc(x) + net.fc(y).sum(), fc=nn.Linear(4, 4)))
    x, y = skewed(9, 4), skewed(3, 4, seed=1)
    simulated = quantized(model, [(x, y)])
    corrected, _ = correct_bias(simulated, model, [(x, y)])
    shift = shift_by_hand(model.fc, simulated.fc, torch.cat([x, y]))
    torch.testing.assert_close(corrected.fc.layer.bias - model.fc.bias, shift, rtol=1e-10, atol=1e-12)


def test_images_of_different_sizes_and_without_a_batch_dimension_count_by_their_positions():
    layer = ready(nn.Conv2d(2, 3, 3))
    data = [skewed(2, 2, 5, 5), skewed(2, 2, 9, 6), skewed(1, 2, 5, 5, seed=2), skewed(2, 7, 7), skewed(0, 2, 4, 4)]
    simulated = quantized(layer, data)
    corrected, _ = correct_bias(simulated, layer, data)
    images = [image for item in data for image in (item if item.ndim == 4 else [item])]
    rounded = [fake_quantize(image, simulated.scale) for image in images]
    exact, approximate = (
        torch.cat([outputs(each, image).flatten(1) for image in of], dim=1)
        for each, of in ((layer, images), (simulated.layer, rounded))
    )
    expected = (exact - approximate).mean(1)
    torch.testing.assert_close(corrected.layer.bias - layer.bias, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [1, 3, 7, 50])
def test_batches_do_not_matter(size):
    model = ready(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3)))
    x = skewed(50, 1, 6, 6)
    simulated = quantized(model, [x])
    whole, parts = (correct_bias(simulated, model, data)[0] for data in ([x], x.flip(0).split(size)))
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_correcting_twice_is_the_same_as_once():
    model = mlp(torch.float64)
    x = skewed(20, 4)
    once, first = correct_bias(quantized(model, [x]), model, [x])
    twice, second = correct_bias(once, model, [x])
    assert first == second
    assert all(is_same(a.detach(), b.detach()) for a, b in zip(once.parameters(), twice.parameters(), strict=True))


def test_one_shot_data_and_another_forward():
    model = mlp(torch.float64)
    data = [(skewed(5, 4, seed=k), "label") for k in range(3)]
    simulated = quantized(model, [x for x, _ in data])
    expected, _ = correct_bias(simulated, model, [x for x, _ in data])
    got, _ = correct_bias(simulated, model, iter(data), forward=lambda m, item: m(item[0]))
    assert all(is_same(a.detach(), b.detach()) for a, b in zip(expected.parameters(), got.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_has_the_dtype_of_the_weights(dtype):
    model = ready(nn.Linear(4, 6, bias=False), dtype=dtype)
    x = skewed(20, 4).to(dtype)
    corrected, _ = correct_bias(quantized(model, [x]), model, [x])
    assert corrected.layer.bias.dtype == dtype
    assert not corrected.layer.bias.requires_grad
    assert outputs(corrected, x).dtype == dtype


def test_a_layer_that_is_never_called_is_left_alone():
    model = ready(
        Net(lambda net, x: net.fc(x) if x.ndim == 2 else net.idle(x), fc=nn.Linear(4, 3), idle=nn.Linear(4, 3))
    )
    x = skewed(20, 4)
    simulated = quantized(model, [x, skewed(2, 2, 4)])
    corrected, corrections = correct_bias(simulated, model, [x])
    assert list(corrections) == ["fc"]
    assert is_same(corrected.idle.layer.bias.detach(), model.idle.bias.detach())


def test_the_models_given_are_left_as_they_were():
    model = mlp(torch.float64)
    x = skewed(20, 4)
    simulated = quantized(model, [x])
    before = fingerprint(model), fingerprint(simulated)
    corrected, corrections = correct_bias(simulated, model, [x])
    assert (fingerprint(model), fingerprint(simulated)) == before
    assert num_hooks(corrected) == num_hooks(simulated)
    assert not is_same(outputs(corrected, x), outputs(simulated, x))
    assert json.loads(json.dumps(corrections)) == corrections


def test_hooks_come_off_when_the_model_fails():
    model = mlp(torch.float64)
    simulated = quantized(model, [skewed(20, 4)])

    def data():
        yield skewed(20, 4)
        raise Broken

    with pytest.raises(Broken):
        correct_bias(simulated, model, data())
    assert num_hooks(model) == 0


def test_a_model_that_was_not_simulated_is_refused():
    with pytest.raises(InvalidInputError, match=r"result of simulate\(\), got a model without quantized layers"):
        correct_bias(mlp(), mlp(), [batch(2, 4)])


def test_another_reference_is_refused():
    x = skewed(20, 4)
    simulated = quantized(mlp(torch.float64), [x])
    with pytest.raises(InvalidInputError, match=r"one without \['first', 'second'\]"):
        correct_bias(simulated, ready(nn.Sequential(nn.Linear(4, 6))), [x])
    other = ready(Net(lambda net, x: net.second(net.first(x)), first=nn.Linear(4, 5), second=nn.Linear(5, 3)))
    with pytest.raises(InvalidInputError, match=r"layer `first`.*got weights of shape \(5, 4\), not \(6, 4\)"):
        correct_bias(simulated, other, [x])


def test_what_is_not_finite_is_named_with_layer_and_batch():
    model = mlp(torch.float64)
    x = skewed(20, 4)
    simulated = quantized(model, [x])
    with pytest.raises(InvalidInputError, match="layer `first`, batch 1: activations must be finite"):
        correct_bias(simulated, model, [x, x * float("nan")])


def test_no_data_and_training_mode_are_refused():
    model = mlp(torch.float64)
    simulated = quantized(model, [skewed(20, 4)])
    with pytest.raises(InvalidInputError, match="at least one calibration batch"):
        correct_bias(simulated, model, [])
    with pytest.raises(InvalidInputError, match="eval mode"):
        correct_bias(simulated, model.train(), [skewed(20, 4)])


def test_layers_that_stay_in_floating_point_are_left_alone():
    model = mlp(torch.float64)
    x = skewed(20, 4)
    thresholds = {"second": LayerThreshold(1.0, 0.5, float("nan"), 0.0)}
    simulated = simulate(model, quantize_weights(model), thresholds)
    corrected, corrections = correct_bias(simulated, model, [x])
    assert list(corrections) == ["second"]
    assert is_same(corrected.first.bias.detach(), model.first.bias.detach())
