import warnings

import pytest
import torch
from torch import nn

from klquant.backends.torch import Fold
from klquant.backends.torch.folding.apply import fold_in_place
from klquant.backends.torch.model.edits import replace_module, restored
from klquant.backends.torch.model.layers import LayerReLU, weighted_layers
from support.networks import Broken, Net, batch, fingerprint, is_same, mlp, outputs


def joined(layer):
    return LayerReLU(layer, nn.ReLU()).eval()


def test_a_module_is_replaced_in_all_places_and_nothing_else_is():
    old, other = nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.Sequential(old, nn.Sequential(other, nn.Sequential(old)), nn.ModuleDict({"x": old}), old)
    model.stages = [(old, other)]
    replace_module(old, nn.Tanh())
    held = (model[0], model[1][1][0], model[2]["x"], model[3], model.stages[0][0])
    assert [type(module) for module in held] == [nn.Tanh] * 5
    assert is_same(model[0](torch.ones(2)), torch.ones(2).tanh())
    assert model[1][0] is other
    assert type(other) is nn.Linear
    assert not list(model[0].parameters())


def test_the_root_is_replaced_too():
    root = nn.Linear(2, 2)
    replace_module(root, nn.Tanh())
    assert type(root) is nn.Tanh


def test_a_layer_can_be_replaced_by_its_own_wrapper():
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, layer)
    weight, expected = layer.weight, outputs(layer, torch.ones(1, 2)).relu()
    replace_module(layer, joined(layer))
    assert type(model[0]) is LayerReLU
    assert model[0] is model[1]
    assert type(model[0].layer) is nn.Linear
    assert model[0].layer.weight is weight
    assert is_same(outputs(model[0], torch.ones(1, 2)), expected)
    assert list(weighted_layers(model)) == [("0", model[0])]
    assert list(model.state_dict()) == ["0.layer.weight", "0.layer.bias", "1.layer.weight", "1.layer.bias"]


FOLDS = [Fold("norm", "batch_norm", "first", ""), Fold("relu", "relu", "first", "")]


def test_folds_that_are_tried_are_undone():
    model, x = mlp(), batch(5, 4, dtype=torch.float32)
    before, expected = fingerprint(model), outputs(model, x)
    for _ in range(2):
        with restored(model):
            fold_in_place(model, FOLDS)
            assert [type(model.first), type(model.norm)] == [LayerReLU, nn.Identity]
            torch.testing.assert_close(outputs(model, x), expected)
        assert fingerprint(model) == before
    assert is_same(outputs(model, x), expected)


def test_a_root_that_was_replaced_is_itself_again():
    root = nn.Linear(2, 2)
    before = fingerprint(root)
    with restored(root):
        replace_module(root, joined(root))
    assert fingerprint(root) == before


def test_an_error_undoes_the_changes_too():
    model = mlp()
    before = fingerprint(model)

    def fail():
        fold_in_place(model, FOLDS)
        raise Broken

    with pytest.raises(Broken), restored(model):
        fail()
    assert fingerprint(model) == before


def test_what_a_run_writes_to_buffers_and_attributes_is_undone():
    def run(net, x):
        net.seen += 1
        net.last, net.lost = x, None
        net.extra = nn.Identity()
        net.register_buffer("late", x)
        return x

    model = Net(run)
    model.register_buffer("seen", torch.zeros(2))
    model.register_buffer("never", None)
    model.last = None
    before, names = model.seen, sorted(vars(model))
    for _ in range(2):
        with restored(model):
            model(torch.ones(2))
            assert model.seen.tolist() == [1, 1]
        assert sorted(vars(model)) == names
    assert model.seen is before
    assert (model.seen.tolist(), model.last, list(model._buffers)) == ([0, 0], None, ["seen", "never"])
    assert not list(model.children())


def test_models_with_torchscript_inside_are_restored():
    model = Net(lambda net, x: net.script(net.fc(x)), fc=nn.Linear(2, 2), script=script(nn.Linear(2, 2)))
    x = torch.ones(1, 2)
    expected = outputs(model, x)
    with restored(model):
        replace_module(model.fc, nn.Identity())
    assert is_same(outputs(model, x), expected)


def script(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        return torch.jit.trace(model, torch.ones(1, 2))
