import copy
import pickle

import pytest
import torch
from klquant.backends.torch.layers import (
    WEIGHTED,
    LayerReLU,
    LayerWrapper,
    channel_axis,
    inner_layer,
    replace_module,
    weighted_layers,
)
from networks import Net, is_same, outputs
from torch import nn


class OddLinear(nn.Linear):
    """What a subclass computes is not known."""


def joined(layer):
    return LayerReLU(layer, nn.ReLU()).eval()


def test_weighted_layers_are_named_as_in_the_model():
    model = nn.Sequential(nn.Conv1d(1, 1, 1), nn.ReLU(), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    assert list(weighted_layers(model)) == [("0", model[0]), ("2.0", model[2][0])]


@pytest.mark.parametrize("kind", WEIGHTED)
def test_every_kind_of_layer_is_found_at_the_root(kind):
    layer = kind(2, 2) if kind is nn.Linear else kind(2, 2, 1)
    assert list(weighted_layers(layer)) == [("", layer)]


def test_a_joined_layer_is_found_once_under_its_own_name():
    model = Net(None, fc=joined(nn.Linear(2, 2)), other=nn.Linear(2, 2))
    assert list(weighted_layers(model)) == [("fc", model.fc), ("other", model.other)]
    assert inner_layer(model.fc) is model.fc.layer
    assert inner_layer(model.other) is model.other


def test_subclasses_are_left_alone():
    assert list(weighted_layers(nn.Sequential(OddLinear(2, 2)))) == []


def test_the_channel_axis_is_that_of_the_output_channels():
    for kind in WEIGHTED:
        layer = kind(2, 5) if kind is nn.Linear else kind(2, 5, 3)
        assert layer.weight.shape[channel_axis(layer)] == 5


def test_a_joined_layer_computes_relu_of_layer_and_passes_arguments_on():
    layer = nn.ConvTranspose1d(2, 3, 3, stride=2).eval()
    x = torch.randn(4, 2, 5)
    for size in ([11], [12]):
        expected = outputs(layer, x, output_size=size).clamp(min=0)
        assert expected.count_nonzero() < expected.numel()
        assert is_same(outputs(joined(layer), x, output_size=size), expected)
        assert is_same(outputs(joined(layer), x, size), expected)


def test_attributes_of_the_layer_stay_readable():
    layer = nn.Conv2d(2, 3, 5, stride=2)
    wrapped = joined(layer)
    assert wrapped.weight is layer.weight
    assert wrapped.bias is layer.bias
    assert (wrapped.kernel_size, wrapped.stride, wrapped.out_channels) == ((5, 5), (2, 2), 3)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = wrapped.no_such_thing


def test_a_wrapper_has_the_mode_of_its_layer():
    assert LayerWrapper(nn.Linear(2, 2).eval()).training is False
    assert LayerWrapper(nn.Linear(2, 2).train()).training is True


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])  # noqa: S301
def test_a_wrapper_can_be_copied_and_pickled(copied):
    wrapped = joined(nn.Linear(2, 3))
    twin = copied(wrapped)
    assert twin.layer is not wrapped.layer
    assert is_same(twin.weight.detach(), wrapped.weight.detach())
    assert list(twin.state_dict()) == ["layer.weight", "layer.bias"]


def test_a_module_is_replaced_in_all_places_and_nothing_else_is():
    old, other = nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.Sequential(old, nn.Sequential(other, nn.Sequential(old)), nn.ModuleDict({"x": old}))
    new = nn.Identity()
    assert replace_module(model, old, new) is model
    assert model[0] is model[1][1][0] is model[2]["x"] is new
    assert model[1][0] is other


def test_replacing_the_root_returns_the_new_module():
    old, new = nn.Linear(2, 2), nn.Identity()
    assert replace_module(old, old, new) is new


def test_a_layer_can_be_replaced_by_its_own_wrapper():
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer)
    wrapped = joined(layer)
    replace_module(model, layer, wrapped)
    assert model[0] is wrapped
    assert wrapped.layer is layer


def test_a_module_with_two_names_in_one_parent_is_replaced_under_both():
    old, new = nn.Linear(2, 2), nn.Identity()
    model = nn.Sequential(old, nn.ReLU(), old)
    replace_module(model, old, new)
    assert model[0] is new
    assert model[2] is new
