import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import klquant
from klquant.backends.torch import (
    LayerThreshold,
    collect_amax,
    fake_quantize,
    fold_relu,
    quantize,
    quantize_weights,
    saturate_like_engines,
    simulate,
)
from klquant.backends.torch.model.layers import LayerReLU, channel_axis, inner_layer, weighted_layers
from klquant.backends.torch.simulation import QuantizedLayer, quantized_layers
from klquant.errors import InvalidInputError
from support.networks import Net, batch, fingerprint, is_same, mlp, outputs, ready

LAYERS = {
    "Linear": nn.Linear(4, 6),
    "Conv1d": nn.Conv1d(4, 6, 3),
    "Conv2d grouped": nn.Conv2d(4, 6, 3, groups=2),
    "Conv3d depthwise": nn.Conv3d(4, 8, 2, groups=4),
    "ConvTranspose1d": nn.ConvTranspose1d(4, 6, 3),
    "ConvTranspose2d": nn.ConvTranspose2d(4, 6, 3),
    "ConvTranspose3d": nn.ConvTranspose3d(4, 6, 2),
}


def clipping(value):
    return LayerThreshold(value, value, float("nan"), 0.0)


def simulated(model, threshold=2.0, observe="inputs"):
    """Simulate a model with the same threshold everywhere."""
    names = [name for name, _ in weighted_layers(model)]
    return simulate(model, quantize_weights(model), dict.fromkeys(names, clipping(threshold)), observe=observe)


def by_hand(x, scale):
    """Quantize and dequantize as the formula says, in NumPy float64."""
    x, scale = x.detach().double().numpy(), np.asarray(scale, np.float64)
    levels = np.clip(np.rint(x / np.where(scale > 0, scale, 1)), -127, 127)
    return torch.from_numpy(levels * scale)


def weights_by_hand(weight):
    """Quantize weights of shape (out channels, ...) with T_c = max |w_c|."""
    scales = weight.detach().abs().flatten(1).amax(1).double() / 127
    return by_hand(weight, scales.numpy().reshape(-1, *[1] * (weight.ndim - 1)))


# --- fake_quantize ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("axis", "scale"), [(None, 0.03), (0, [0.1, 0.0, 0.007]), (1, [1.0, 3e-5, 0.02, 0.0, 0.3])])
def test_fake_quantize_is_that_of_the_core(dtype, axis, scale):
    scale = torch.tensor(scale, dtype=torch.float32)
    x = batch(3, 5, 7, dtype=dtype) * 3
    x[0, 0, :3] = torch.tensor([torch.inf, -torch.inf, 0.0])
    got = fake_quantize(x, scale, axis=axis)
    assert got.dtype == dtype
    core_scale = scale.numpy().astype(x.numpy().dtype)
    expected = klquant.fake_quantize(x.numpy(), core_scale if axis is not None else float(scale), axis=axis)
    np.testing.assert_array_equal(got.numpy(), expected)
    assert got.unique().numel() > 20


def test_halves_are_rounded_to_even_levels():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.5, 300.0])
    expected = torch.tensor([0.0, 2, 2, 0, -2, -2, 126, 127, 127])
    assert torch.equal(fake_quantize(x, torch.tensor(1.0)), expected)
    assert torch.equal(fake_quantize(x / 4, torch.tensor(0.25)), expected / 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_are_computed_in_float32(dtype):
    x = (3 * batch(500, dtype=torch.float32)).to(dtype)
    scale = torch.tensor(0.011)
    assert is_same(fake_quantize(x, scale).float(), fake_quantize(x.float(), scale).to(dtype).float())


def test_a_scale_of_zero_gives_zeros_and_no_nan():
    x = torch.tensor([[1.0, -2.0], [torch.inf, 1e30]])
    assert torch.equal(fake_quantize(x, torch.tensor(0.0)), torch.zeros(2, 2))
    assert torch.equal(fake_quantize(x, torch.tensor([0.0, 1e30]), axis=0)[0], torch.zeros(2))


def test_fake_quantize_does_not_write_to_its_arguments():
    x, scale = batch(4, 3), torch.tensor([0.1, 0.0, 0.2])
    before = x._version, scale._version
    fake_quantize(x, scale, axis=1)
    assert (x._version, scale._version) == before


# --- quantize_weights ---


@pytest.mark.parametrize("name", LAYERS)
def test_weight_scales_are_per_output_channel(name):
    layer = copy.deepcopy(LAYERS[name]).eval()
    scales = quantize_weights(nn.Sequential(layer).eval())
    weight = layer.weight.detach()
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        weight = weight.transpose(0, 1)
    expected = torch.stack([channel.abs().max() for channel in weight]) / 127
    assert list(scales) == ["0"]
    assert is_same(scales["0"], expected)
    assert len(set(expected.tolist())) == len(expected)


@pytest.mark.parametrize("name", LAYERS)
def test_simulated_weights_take_at_most_255_values_per_channel_and_reach_the_largest(name):
    layer = copy.deepcopy(LAYERS[name]).eval()
    layer.weight.data.copy_(batch(*layer.weight.shape))
    got = simulated(nn.Sequential(layer))[0].weight
    axis = channel_axis(layer)
    for given, channel in zip(layer.weight.detach().movedim(axis, 0), got.movedim(axis, 0), strict=True):
        largest = given.abs().max()
        levels = channel / (largest / 127)
        torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
        assert levels.abs().max().round() == 127
        assert (channel - given).abs().max() <= largest / 254 * 1.0001


def test_many_weights_take_exactly_255_values():
    layer = nn.Linear(20_000, 2, bias=False).eval()
    got = simulated(nn.Sequential(layer))[0].weight
    assert [row.unique().numel() for row in got] == [255, 255]


def test_dead_channels_become_zero():
    layer = nn.ConvTranspose1d(2, 4, 3).eval()
    with torch.no_grad():
        layer.weight[:, 1] = 0
        layer.weight[:, 2] = 0.9999e-4
        layer.weight[:, 3] = 1.0001e-4
    model = nn.Sequential(layer)
    scales = quantize_weights(model, dead_channel=1e-4)
    assert (scales["0"] > 0).tolist() == [True, False, False, True]
    got = simulate(model, scales, {"0": clipping(1.0)})[0].weight
    assert not got[:, 1:3].any()
    assert got[:, 3].all()
    assert (quantize_weights(model)["0"] > 0).tolist() == [True, False, True, True]
    assert simulated(model)[0].weight[:, 2].all()
    assert outputs(simulated(model), torch.randn(2, 2, 5)).isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(bad):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))).eval()
    with torch.no_grad():
        model[1][0].weight[0, 1] = bad
    with pytest.raises(InvalidInputError, match=r"layer `1\.0`: weights must be finite"):
        quantize_weights(model)


# --- simulate ---


@pytest.mark.parametrize("observe", ["inputs", "outputs"])
def test_a_linear_layer_by_hand(observe):
    layer = ready(nn.Linear(4, 3))
    x = 2 * batch(50, 4)
    threshold = 1.5
    scale = float(np.float32(threshold / 127))
    weight = weights_by_hand(layer.weight)
    entering = by_hand(x, scale) if observe == "inputs" else x
    expected = entering @ weight.T + layer.bias.detach()
    if observe == "outputs":
        expected = by_hand(expected, scale)
    got = outputs(simulated(nn.Sequential(layer), threshold, observe), x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)  # weight scales are float32
    assert (got - outputs(layer, x)).abs().max() > 1e-3


@pytest.mark.parametrize("observe", ["inputs", "outputs"])
def test_a_convolution_with_its_relu_by_hand(observe):
    model = ready(nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, stride=2), nn.ReLU()))
    conv, x = model[0], batch(4, 3, 8, 8)
    joined, _ = fold_relu(model, x)
    threshold = 1.0
    scale = float(np.float32(threshold / 127))
    columns = F.unfold(by_hand(x, scale) if observe == "inputs" else x, 3, padding=1, stride=2)
    expected = weights_by_hand(conv.weight).flatten(1) @ columns + conv.bias.detach()[:, None]
    expected = expected.clamp(min=0).reshape(4, 5, 4, 4)
    if observe == "outputs":
        expected = by_hand(expected, scale)
    result = simulated(joined, threshold, observe)
    assert isinstance(result[0], QuantizedLayer)
    assert isinstance(result[0].layer, LayerReLU)
    torch.testing.assert_close(outputs(result, x), expected, rtol=0, atol=1e-6)


def test_a_transposed_convolution_by_hand():
    layer = ready(nn.ConvTranspose1d(3, 5, 3))
    x = batch(4, 3, 6)
    scale = float(np.float32(2 / 127))
    weight = weights_by_hand(layer.weight.transpose(0, 1)).transpose(0, 1)
    expected = F.conv_transpose1d(by_hand(x, scale), weight, layer.bias.detach())
    torch.testing.assert_close(outputs(simulated(nn.Sequential(layer)), x), expected, rtol=0, atol=1e-6)


def test_each_layer_has_its_own_threshold():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    result = simulate(model, quantize_weights(model), {"0": clipping(12.7), "1": clipping(0.254)})
    assert [layer.scale.item() for layer in result] == pytest.approx([0.1, 0.002])


def test_inputs_beyond_the_threshold_saturate():
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).eval()
    result = simulated(model, threshold=1.27)
    for x in (1.27, 5.0, 1e9):
        torch.testing.assert_close(outputs(result, torch.tensor([[x]])), 1.27 * model[0].weight.detach())


def test_inputs_far_below_get_one_level_more_where_engines_saturate():
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).eval()
    result = simulated(model, threshold=1.27)
    before = fingerprint(result)
    engine, weight = saturate_like_engines(result), result[0].weight
    for x, level in ((-1.27, -127), (-1.275, -128), (-9.0, -128), (9.0, 127)):
        torch.testing.assert_close(outputs(engine, torch.tensor([[x]])), level * 0.01 * weight)
        torch.testing.assert_close(outputs(result, torch.tensor([[x]])), max(level, -127) * 0.01 * weight)
    assert is_same(engine[0].weight, weight)
    assert fingerprint(result) == before


def test_engines_saturate_at_the_lowest_code_of_any_number_of_bits():
    model = nn.Sequential(nn.Linear(2, 2)).eval()
    found = {"0": clipping(7.0)._replace(num_bits=4)}
    engine = saturate_like_engines(simulate(model, quantize_weights(model, num_bits=4), found, observe="outputs"))
    engine[0].layer.bias.data.fill_(-100)
    assert outputs(engine, torch.zeros(1, 2)).tolist() == [[-8.0, -8.0]]


def test_only_a_simulated_model_saturates():
    with pytest.raises(InvalidInputError, match="without quantized layers"):
        saturate_like_engines(mlp())


def test_a_layer_without_a_threshold_stays_as_it_is():
    model = mlp()
    result = simulate(model, quantize_weights(model), {"second": clipping(1.0)})
    assert type(result.first) is nn.Linear
    assert is_same(result.first.weight.detach(), model.first.weight.detach())
    assert isinstance(result.second, QuantizedLayer)


@pytest.mark.parametrize("observe", ["inputs", "outputs"])
def test_the_model_may_be_a_single_layer(observe):
    layer = ready(nn.Conv1d(3, 4, 2), dtype=torch.float32)
    x = batch(2, 3, 6, dtype=torch.float32)
    result = simulated(layer, observe=observe)
    assert isinstance(result, QuantizedLayer)
    assert is_same(outputs(result, x), outputs(simulated(nn.Sequential(layer), observe=observe), x))


def test_a_layer_in_two_modules_is_quantized_in_both():
    fc = nn.Linear(4, 4).eval()
    model = nn.Sequential(nn.Sequential(fc), nn.Sequential(fc)).eval()
    result = simulated(model)
    assert result[0][0] is result[1][0]
    assert isinstance(result[0][0], QuantizedLayer)


def test_the_given_model_stays_as_it_is():
    model = mlp()
    scales, thresholds = quantize_weights(model), {"first": clipping(1.0), "second": clipping(1.0)}
    before, given = fingerprint(model), (copy.deepcopy(scales), dict(thresholds))
    result = simulate(model, scales, thresholds)
    outputs(result, batch(3, 4, dtype=torch.float32))
    assert fingerprint(model) == before
    assert thresholds == given[1]
    assert all(is_same(scales[name], given[0][name]) for name in scales)
    result.first.layer.bias.data.zero_()
    assert fingerprint(model) == before


def test_a_simulated_model_can_be_copied_saved_and_loaded():
    result = simulated(fold_relu(mlp(), batch(3, 4, dtype=torch.float32))[0])
    x = batch(9, 4, dtype=torch.float32)
    expected = outputs(result, x)
    copied = copy.deepcopy(result)
    assert is_same(outputs(copied, x), expected)
    assert is_same(outputs(pickle.loads(pickle.dumps(result)), x), expected)  # noqa: S301
    for tensor in copied.state_dict().values():
        tensor.zero_()
    assert not is_same(outputs(copied, x), expected)
    assert copied.load_state_dict(result.state_dict()) == ([], [])
    assert is_same(outputs(copied, x), expected)
    assert "first.scale" in result.state_dict()


def test_a_simulated_model_is_in_eval_mode_and_its_weights_take_no_gradient():
    result = simulated(mlp())
    assert not any(module.training for module in result.modules())
    assert not result.first.weight.requires_grad
    assert result.norm.weight.requires_grad


def test_attributes_and_extra_arguments_reach_the_layer():
    layer = ready(nn.ConvTranspose1d(3, 5, 3, stride=2), dtype=torch.float32)
    net = Net(lambda net, x: net.up(x, output_size=[2 * x.shape[-1] + net.up.kernel_size[0] - 1]), up=layer).eval()
    assert outputs(simulated(net), torch.zeros(1, 3, 5)).shape == (1, 5, 12)
    assert outputs(simulated(net, observe="outputs"), torch.zeros(1, 3, 5)).shape == (1, 5, 12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_of_the_model_is_kept(dtype):
    result = simulated(mlp(dtype))
    assert result.first.weight.dtype == dtype
    assert result.first.scale.dtype == torch.float32
    assert outputs(result, batch(3, 4).to(dtype)).dtype == dtype


# --- found wrong while these tests were written ---


def test_a_layer_with_two_names_in_one_parent_is_quantized_under_both():
    fc = nn.Linear(4, 4)
    result = simulated(nn.Sequential(fc, nn.ReLU(), fc).eval())
    assert isinstance(result[2], QuantizedLayer)


def test_a_layer_called_with_a_keyword_is_quantized():
    model = Net(lambda net, x: net.fc(input=x), fc=nn.Linear(4, 4)).eval()
    assert collect_amax(model, [torch.ones(2, 4)]) == {"fc": 1.0}
    outputs(simulated(model), torch.ones(2, 4))


def test_a_pruned_layer_is_quantized():
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    prune.l1_unstructured(model[0], "weight", amount=0.3)
    outputs(model, torch.ones(2, 4))
    outputs(simulated(model), torch.ones(2, 4))


def test_a_parametrized_layer_is_not_quantized():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4))).eval()
    assert list(quantize_weights(model)) == []


def test_a_transformer_layer_is_quantized_also_without_gradients():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    result = simulated(model, threshold=1.0)
    x = batch(2, 5, 8, dtype=torch.float32)
    torch.testing.assert_close(outputs(result, x), result(x).detach(), rtol=0, atol=1e-5)


def test_zero_has_no_sign():
    assert is_same(fake_quantize(torch.tensor([-0.1]), torch.tensor(1.0)), torch.zeros(1))


def test_the_axis_may_be_counted_from_the_end():
    scale = torch.tensor([1.0, 2.0, 3.0])
    assert is_same(fake_quantize(batch(4, 3), scale, axis=-1), fake_quantize(batch(4, 3), scale, axis=1))


def test_a_vector_of_scales_needs_an_axis():
    with pytest.raises(InvalidInputError, match="axis"):
        fake_quantize(batch(4, 3), torch.tensor([1.0, 2.0, 3.0]))


def test_integers_are_not_fake_quantized():
    with pytest.raises(InvalidInputError, match=r"`x` must be floating point, got torch\.int32"):
        fake_quantize(torch.ones(3, dtype=torch.int32), torch.tensor(0.1))


@pytest.mark.parametrize("num_bits", [1, 17])
def test_numbers_of_bits_without_levels_are_refused(num_bits):
    with pytest.raises(InvalidInputError, match=f"`num_bits` must be 2 to 16, got {num_bits}"):
        fake_quantize(batch(4, 3), torch.tensor(0.1), num_bits=num_bits)
    with pytest.raises(InvalidInputError, match=f"`num_bits` must be 2 to 16, got {num_bits}"):
        quantize_weights(mlp(), num_bits=num_bits)


def test_a_misspelt_observe_is_refused():
    with pytest.raises(InvalidInputError, match="`observe` must be"):
        simulated(mlp(), observe="input")


def test_thresholds_of_another_model_are_refused():
    with pytest.raises(InvalidInputError, match="renamed"):
        simulate(mlp(), quantize_weights(mlp()), {"renamed": clipping(1.0)})


def test_scales_of_another_model_are_refused():
    with pytest.raises(InvalidInputError, match=r"`weight_scales` must hold every layer .* got none of \['first'\]"):
        simulate(mlp(), {}, {"first": clipping(1.0)})


@pytest.mark.filterwarnings("ignore:layer `[^`]*`. (T =|expected SQNR):klquant.errors.CalibrationWarning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scales_stay_in_float32_if_the_model_is_cast(dtype):
    model = quantize(mlp(), [batch(8, 4, dtype=torch.float32)], num_bins=255).model
    before = {name: layer.scale.clone() for name, layer in quantized_layers(model).items()}
    cast = model.to(dtype)
    for name, layer in quantized_layers(cast).items():
        assert layer.scale.dtype == torch.float32
        assert is_same(layer.scale, before[name])
        assert inner_layer(layer.layer).weight.dtype == dtype
    assert outputs(cast, batch(8, 4, dtype=dtype)).dtype == dtype
