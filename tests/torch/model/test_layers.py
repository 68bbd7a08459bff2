import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from klquant.backends.torch.model.layers import (
    WEIGHTED,
    LayerReLU,
    LayerWrapper,
    channel_axis,
    check_supported,
    inner_layer,
    skipped_layers,
    weighted_layers,
)
from klquant.errors import InvalidInputError
from support.networks import Net, is_same, outputs


class OddLinear(nn.Linear):
    """Computes more than a linear layer."""

    def forward(self, x):
        return super().forward(x).exp()


class NamedLinear(nn.Linear):
    """Changes only how it is made."""

    def __init__(self, size):
        super().__init__(size, size)


def traced(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and models hold it
        return torch.jit.trace(model, torch.ones(1, 2))


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


def test_subclasses_are_layers_if_they_keep_what_their_base_computes():
    patched, called = nn.Linear(2, 2), type("Called", (nn.Linear,), {"__call__": lambda self, x: x})(2, 2)
    patched.forward = lambda x: x
    model = nn.Sequential(OddLinear(2, 2), NamedLinear(2), patched, called)
    assert [name for name, _ in weighted_layers(model)] == ["1"]


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


def test_what_is_skipped_has_a_name_and_a_reason():
    model = Net(
        None,
        fc=nn.Linear(2, 2),
        norm=nn.LayerNorm(2),
        odd=OddLinear(2, 2),
        attend=nn.MultiheadAttention(4, 2),
        words=nn.Embedding(3, 2),
        bag=nn.EmbeddingBag(3, 2),
        deep=nn.Sequential(nn.LSTM(2, 2), nn.GRU(2, 2), nn.RNN(2, 2), nn.LSTMCell(2, 2), nn.GRUCell(2, 2)),
        both=nn.Bilinear(2, 2, 2),
        normed=parametrizations.weight_norm(nn.Linear(2, 2)),
        compiled=traced(nn.Sequential(nn.Linear(2, 2), OddLinear(2, 2))),
    )
    reasons = skipped_layers(model)
    deep = [f"deep.{k}" for k in range(5)]
    assert list(reasons) == ["odd", "attend", "words", "bag", *deep, "both", "normed", "compiled"]
    assert "OddLinear" in reasons["odd"]
    assert "projections" in reasons["attend"]
    assert "embedding" in reasons["words"]
    assert "recurrent" in reasons["deep.3"]
    assert "TorchScript" in reasons["compiled"]


def test_a_skipped_root_hides_what_is_inside_it_and_has_the_empty_name():
    assert list(skipped_layers(nn.MultiheadAttention(4, 2))) == [""]
    assert list(skipped_layers(nn.Embedding(4, 2))) == [""]


def test_lazy_modules_are_refused_by_name_until_they_have_weights():
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(2))
    with pytest.raises(InvalidInputError, match="`1`: a LazyLinear that was never run"):
        check_supported(model)
    outputs(model, torch.ones(1, 2))
    check_supported(model)


@pytest.mark.filterwarnings("ignore")  # of the compiler, at its import
def test_compiled_modules_are_refused_by_name():
    with pytest.raises(InvalidInputError, match="got `1`, which is compiled"):
        check_supported(nn.Sequential(nn.Linear(2, 2), torch.compile(nn.Linear(2, 2))))
    with pytest.raises(InvalidInputError, match="got the model, which is compiled"):
        check_supported(torch.compile(nn.Linear(2, 2)))


def test_modules_on_the_meta_device_are_refused_by_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(InvalidInputError, match="got `weight` of `1` on the meta device, which holds no values"):
        check_supported(model)


def test_a_buffer_of_the_model_itself_on_the_meta_device_is_named():
    model = nn.Sequential(nn.Linear(3, 3)).eval()
    model.register_buffer("scores", torch.zeros(2, device="meta"))
    with pytest.raises(InvalidInputError, match="got `scores` of the model on the meta device"):
        check_supported(model)
