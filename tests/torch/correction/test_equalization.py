import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from klquant.backends.torch import fold_batch_norm, fold_relu
from klquant.backends.torch.correction.equalization import Equalized, equalize
from klquant.backends.torch.model.layers import inner_layer, weighted_layers
from klquant.errors import InvalidInputError, ModelError
from support.digits_networks import load
from support.networks import Broken, Net, batch, fingerprint, is_same, num_hooks, outputs, ready

IMAGES = (2, 4, 9, 9)
BETWEEN = {
    "nothing": lambda y: y,
    "ReLU": nn.ReLU(),
    "ReLU in place": nn.ReLU(inplace=True),
    "F.relu": F.relu,
    "torch.relu": torch.relu,
    "Tensor.relu_": torch.Tensor.relu_,
    "two ReLUs": lambda y: F.relu(y).relu(),
    "LeakyReLU": nn.LeakyReLU(0.25),
    "Identity": nn.Identity(),
    "Dropout": nn.Dropout().eval(),
    "Dropout2d": nn.Dropout2d().eval(),
    "MaxPool": nn.MaxPool2d(3, stride=2, padding=1),
    "AvgPool": nn.AvgPool2d(2),
    "adaptive MaxPool": nn.AdaptiveMaxPool2d(4),
    "adaptive AvgPool": nn.AdaptiveAvgPool2d(3),
    "F.max_pool2d": lambda y: F.max_pool2d(y, 2),
    "ReLU, MaxPool, shape": lambda y: F.max_pool2d(F.relu(y), min(2, y.shape[-1])),
}
FLATTENING = {
    "Flatten": nn.Flatten(),
    "torch.flatten": lambda y: torch.flatten(y, 1),
    "view": lambda y: y.view(y.size(0), -1),
    "reshape": lambda y: y.reshape(len(y), 6 * 9),
    "ReLU, Flatten, ReLU": nn.Sequential(nn.ReLU(), nn.Flatten(), nn.ReLU()),
    "twice": lambda y: y.flatten(2).flatten(1),
}
FIRST = {
    "Conv1d": nn.Conv1d(4, 6, 3),
    "Conv2d": nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "Conv3d": nn.Conv3d(4, 6, 2, bias=False),
    "grouped": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": nn.Conv2d(6, 6, 3, groups=6),
    "ConvTranspose1d": nn.ConvTranspose1d(4, 6, 3),
    "ConvTranspose2d grouped": nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2),
    "Linear": nn.Linear(4, 6),
}
SECOND = {
    "Conv1d": nn.Conv1d(6, 4, 3),
    "Conv2d": nn.Conv2d(6, 4, 3, padding=1),
    "Conv3d": nn.Conv3d(6, 4, 2),
    "grouped": nn.Conv2d(6, 4, 3, groups=2),
    "depthwise": nn.Conv2d(6, 12, 3, groups=6),
    "ConvTranspose1d": nn.ConvTranspose1d(6, 4, 3),
    "ConvTranspose2d grouped": nn.ConvTranspose2d(6, 4, 3, groups=2, stride=2),
    "Linear": nn.Linear(6, 4),
}


def uneven(model, *, seed=0):
    """Return the model in float32 and eval mode, the rows and columns of its weights of very different sizes."""
    ready(model, seed=seed, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for weight in (p for p in model.parameters() if p.ndim > 1):
        for axis in (0, 1):
            shape = [-1 if k == axis else 1 for k in range(weight.ndim)]
            weight.data *= (2 * torch.randn(weight.shape[axis], generator=generator)).exp().reshape(shape)
    return model


def pair(first, between, second, **modules):
    return uneven(Net(lambda net, x: net.second(between(net.first(x))), first=first, second=second, **modules))


def numbers(*shape):
    return batch(*shape, dtype=torch.float32)


def channel_ranges(layer, side, number):
    """Return the largest |weight| of each channel, found by what a one in that channel alone brings out or in."""
    layer = inner_layer(layer)
    is_transposed, groups = isinstance(layer, nn.modules.conv._ConvTransposeNd), getattr(layer, "groups", 1)
    rows = layer.weight.detach().abs().chunk(groups)
    by_group = [w.transpose(0, 1) if is_transposed else w for w in rows]  # each (outputs, inputs, ...) of its group
    channels = [w if side == "output" else w.transpose(0, 1) for w in by_group]
    return [float(channel.max()) for w in channels for channel in w.chunk(number // groups)]


def is_balanced(model, number, first="first", second="second"):
    """Return whether no channel could be equalized further by a power of two."""
    left = channel_ranges(model.get_submodule(first), "output", number)
    right = channel_ranges(model.get_submodule(second), "input", number)
    assert len(left) == len(right) == number
    return all(0.5 <= a / b <= 2 for a, b in zip(left, right, strict=True))


def check_equalized(model, x, number=6):
    assert not is_balanced(model, number)
    equalized, (first, second) = equalize(model, x)
    assert first[:3] == ("first", "second", "")
    assert first.largest_factor > 1
    assert second == Equalized("second", None, "the model returns its output", 1.0)
    assert is_balanced(equalized, number)
    assert torch.equal(outputs(equalized, x), outputs(model, x))
    return equalized


# --- what is equalized ---


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_channels_are_scaled_through_functions_that_do_not_mind(between):
    check_equalized(pair(nn.Conv2d(4, 6, 3), between, nn.Conv2d(6, 3, 2)), numbers(*IMAGES))


@pytest.mark.parametrize("flatten", FLATTENING.values(), ids=FLATTENING)
def test_a_flattened_channel_has_a_column_for_each_position(flatten):
    check_equalized(pair(nn.Conv2d(4, 6, 7), flatten, nn.Linear(54, 3)), numbers(*IMAGES))


def layer_pairs():
    for a, first in FIRST.items():
        for b, second in SECOND.items():
            if first.weight.ndim == second.weight.ndim:
                yield pytest.param(first, second, id=f"{a} - {b}")


@pytest.mark.parametrize(("first", "second"), [*layer_pairs()])
def test_all_kinds_of_layers(first, second):
    channels = getattr(first, "in_channels", 4)
    x = numbers(2, channels, *[9] * (first.weight.ndim - 2))
    check_equalized(pair(first, F.relu, second), x)


def test_linear_layers_have_their_channels_in_the_last_dimension():
    check_equalized(pair(nn.Linear(4, 6), F.relu, nn.Linear(6, 3)), numbers(2, 5, 4))


def test_images_without_a_batch_dimension():
    check_equalized(pair(nn.Conv2d(4, 6, 3), nn.MaxPool2d(2), nn.Conv2d(6, 3, 2)), numbers(4, 9, 9))


def test_folded_layers():
    model = pair(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 3))
    folded, _ = fold_relu(model, numbers(*IMAGES))
    assert inner_layer(folded.first) is not folded.first
    check_equalized(folded, numbers(*IMAGES))


def test_a_chain_is_equalized_to_its_end():
    layers = [nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Conv2d(6, 6, 1)]
    model = uneven(nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 25, 3)))
    equalized, entries = equalize(model, numbers(*IMAGES))
    assert [entry[:3] for entry in entries[:-1]] == [("0", "2", ""), ("2", "4", ""), ("4", "6", "")]
    assert all(is_balanced(equalized, 6, *pair) for pair in (("0", "2"), ("2", "4"), ("4", "6")))
    assert torch.equal(outputs(equalized, numbers(*IMAGES)), outputs(model, numbers(*IMAGES)))


def test_the_factor_is_the_rounded_root_of_the_ratio_and_bias_goes_with_the_weights():
    model = pair(nn.Linear(1, 3), F.relu, nn.Linear(3, 1))
    model.first.weight.data, model.first.bias.data = torch.tensor([[64.0], [-2.0], [1.0]]), torch.tensor([8.0, 1, 3])
    model.second.weight.data = torch.tensor([[1.0, 2.0, -300.0]])
    equalized, (entry, _) = equalize(model, torch.ones(1, 1))
    assert equalized.first.weight.flatten().tolist() == [8, -2, 16]
    assert equalized.first.bias.tolist() == [1, 1, 48]
    assert equalized.second.weight.flatten().tolist() == [8, 2, -18.75]
    assert entry.largest_factor == 16


def test_a_dead_channel_is_not_scaled():
    model = pair(nn.Linear(4, 6), F.relu, nn.Linear(6, 3))
    model.first.weight.data[1], model.second.weight.data[:, 4] = 0, 0
    equalized, (entry, _) = equalize(model, numbers(5, 4))
    assert entry.largest_factor > 2
    assert is_same(equalized.first.bias[[1, 4]].detach(), model.first.bias[[1, 4]].detach())
    assert is_same(equalized.second.weight[:, [1, 4]].detach(), model.second.weight[:, [1, 4]].detach())
    assert is_same(equalized.first.weight[4].detach(), model.first.weight[4].detach())


def test_weights_keep_their_strides():
    model = pair(nn.Conv2d(4, 6, 3), F.relu, nn.Conv2d(6, 3, 3)).to(memory_format=torch.channels_last)
    equalized = check_equalized(model, numbers(*IMAGES).to(memory_format=torch.channels_last))
    for before, after in zip(model.parameters(), equalized.parameters(), strict=True):
        assert before.stride() == after.stride()
        assert before.requires_grad == after.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    model = pair(nn.Linear(4, 6), F.relu, nn.Linear(6, 3)).to(dtype)
    equalized, (entry, _) = equalize(model, numbers(5, 4).to(dtype))
    assert entry[:3] == ("first", "second", "")
    assert equalized.first.weight.dtype == dtype
    assert is_same(outputs(equalized.double(), batch(5, 4)), outputs(model.double(), batch(5, 4)))


# --- what is left alone ---


def reused(net, x):
    y = net.first(x)
    return net.second(y.relu()) + y.sum()


def returned_too(net, x):
    y = net.first(x)
    return net.second(y), y


def values_are_read(net, x):
    y = net.first(x)
    return net.second(y) * y.max().item()


def in_place_after_a_view(net, x):
    y = net.first(x)
    view = y[0]
    return net.second(y.relu_()) + view.sum()


def tied(net, x):
    return net.second(net.first(x)) + F.linear(x, net.first.weight).sum()


LEFT_ALONE = {
    "ReLU6": (lambda net, x: net.second(F.relu6(net.first(x))), "relu6 lies between"),
    "ReLU6 module": (lambda net, x: net.second(nn.ReLU6()(net.first(x))), "hardtanh lies between"),
    "sigmoid": (lambda net, x: net.second(net.first(x).sigmoid()), "sigmoid lies between"),
    "negation": (lambda net, x: net.second(-net.first(x)), "neg lies between"),
    "addition": (lambda net, x: net.second(net.first(x) + x), "add lies between"),
    "normalization": (lambda net, x: net.second(F.layer_norm(net.first(x), (4,))), "layer_norm lies between"),
    "a part": (lambda net, x: net.second(net.first(x)[:1]), "__getitem__ lies between"),
    "used elsewhere": (reused, "its output is used more than once"),
    "used as a view": (in_place_after_a_view, "its output is used more than once"),
    "returned too": (returned_too, "its output is used more than once"),
    "values are read": (values_are_read, "its output is used more than once"),
    "first called twice": (lambda net, x: net.second(net.first(net.first(x))), "`first` is called more than once"),
    "second called twice": (lambda net, x: net.second(net.second(net.first(x))), "`second` is called more than once"),
    "weights used outside": (tied, "`first` has weights that are used elsewhere too"),
    "no layer follows": (lambda net, x: net.first(x).sum(1), "sum lies between"),
    "output not used": (lambda net, x: (net.first(x), net.second(x))[1], "its output is not used"),
    "pooled channels": (lambda net, x: net.second(F.max_pool1d(net.first(x), 3, 1, 1)), "max_pool1d lies between"),
    "reshaped channels": (lambda net, x: net.second(net.first(x).reshape(4, 5).T), "reshape lies between"),
}


def check_left_alone(model, x, reason):
    equalized, (entry, *_) = equalize(model, x)
    assert entry.first == "first"
    assert reason in entry.reason
    assert entry.largest_factor == 1
    for before, after in zip(model.parameters(), equalized.parameters(), strict=True):
        assert is_same(before.detach(), after.detach())
    return equalized


@pytest.mark.parametrize(("run", "reason"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_a_pair_is_left_alone_with_the_reason(run, reason):
    model = uneven(Net(run, first=nn.Linear(4, 4), second=nn.Linear(4, 4)))
    check_left_alone(model, numbers(5, 4), reason)


def test_two_layers_that_read_one_output():
    def run(net, x):
        y = net.first(x)
        return net.second(y) + net.third(y)

    model = uneven(Net(run, first=nn.Linear(4, 4), second=nn.Linear(4, 4), third=nn.Linear(4, 4)))
    check_left_alone(model, numbers(5, 4), "its output is used more than once")


def test_a_folded_relu6():
    model = pair(nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 4), relu=nn.ReLU6())
    model.run = lambda net, x: net.second(net.relu(net.first(x)))
    folded, _ = fold_relu(model, numbers(5, 4))
    check_left_alone(folded, numbers(5, 4), "ReLU6 lies between")


def test_a_batch_norm_that_was_not_folded():
    model = pair(nn.Conv2d(4, 6, 3), nn.Identity(), nn.Conv2d(6, 3, 3), norm=nn.BatchNorm2d(6))
    model.run = lambda net, x: net.second(net.norm(net.first(x)))
    check_left_alone(model, numbers(*IMAGES), "batch_norm lies between")


def test_channels_that_lie_in_another_dimension_than_the_next_layer_reads():
    model = pair(nn.Conv2d(4, 6, 3), F.relu, nn.Linear(7, 3))
    check_left_alone(model, numbers(*IMAGES), "its channels are not the input channels of `second`")


def test_shared_weights():
    model = pair(nn.Linear(4, 4), F.relu, nn.Linear(4, 4))
    model.second.weight = model.first.weight
    check_left_alone(model, numbers(5, 4), "`first` shares weights with another module")


def test_a_computed_weight():
    model = pair(nn.Linear(4, 4), F.relu, parametrizations.weight_norm(nn.Linear(4, 4)))
    check_left_alone(model, numbers(5, 4), "linear lies between")


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_bias_that_is_no_parameter(name):
    model = pair(nn.Linear(4, 4), F.relu, nn.Linear(4, 4))
    layer = model.get_submodule(name)
    bias = layer.bias.detach()
    del layer.bias
    layer.register_buffer("bias", bias)
    check_left_alone(model, numbers(5, 4), f"`{name}` has a bias that is not a parameter")


@pytest.mark.parametrize("name", ["first", "second"])
def test_hooks(name):
    model = pair(nn.Linear(4, 4), F.relu, nn.Linear(4, 4))
    model.get_submodule(name).register_forward_hook(lambda *args: None)
    check_left_alone(model, numbers(5, 4), f"`{name}` has hooks")


def test_what_overflows_is_undone():
    model = pair(nn.Linear(1, 1), F.relu, nn.Linear(1, 1)).half()
    model.first.weight.data[:], model.first.bias.data[:] = 2**-13.6, 0
    model.second.weight.data[:], model.second.bias.data[:] = 2**13.6, 0
    x = torch.full((1, 1), 60000.0, dtype=torch.half)
    check_left_alone(model, x, "equalizing changed the output of the model")


# --- networks ---


@pytest.mark.parametrize(("name", "number"), [("VGG", 5), ("residual net", 3), ("MobileNetV2", 0), ("scaled VGG", 5)])
def test_trained_networks_stay_the_same_function(name, number):
    x = torch.rand(8, 1, 8, 8)
    folded, _ = fold_batch_norm(load(name), x)
    folded, _ = fold_relu(folded, x)
    equalized, entries = equalize(folded, x)
    assert sum(not entry.reason for entry in entries) == number
    assert len(entries) == len(list(weighted_layers(folded)))
    assert torch.equal(outputs(equalized, x), outputs(folded, x))


def test_the_model_given_is_left_as_it_was():
    model = pair(nn.Linear(4, 6), F.relu, nn.Linear(6, 3))
    before = fingerprint(model)
    equalized, _ = equalize(model, numbers(5, 4))
    assert fingerprint(model) == before
    assert num_hooks(equalized) == 0


def test_hooks_come_off_when_the_model_fails():
    copies = []

    def forward(model, x):
        copies.append(model)
        model(x)
        raise Broken

    with pytest.raises(ModelError, match="batch 0") as caught:
        equalize(pair(nn.Linear(4, 6), F.relu, nn.Linear(6, 3)), numbers(5, 4), forward=forward)
    assert isinstance(caught.value.__cause__, Broken)
    assert num_hooks(copies[0]) == 0


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(InvalidInputError, match="eval mode"):
        equalize(pair(nn.Linear(4, 6), F.relu, nn.Linear(6, 3)).train(), numbers(5, 4))


def test_entries_go_to_json():
    _, entries = equalize(pair(nn.Linear(4, 6), F.relu, nn.Linear(6, 3)), numbers(5, 4))
    assert json.loads(json.dumps([entry._asdict() for entry in entries]))[0]["second"] == "second"
