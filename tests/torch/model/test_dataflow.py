import contextlib
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from klquant.backends.torch.model.dataflow import OUTPUT, Consumer, count_uses, record_calls
from klquant.backends.torch.model.products import Product
from support.networks import Broken, Net, fingerprint, ready

X = torch.ones(2, 3)


def record(model, *args):
    return record_calls(model, lambda: model(*args)).calls


def consumers_of_fc(use, **modules):
    """Return who consumed y = fc(x) in ``use(net, y)``."""
    net = Net(lambda net, x: use(net, net.fc(x)), fc=nn.Linear(3, 3), **modules).eval()
    (call,) = record(net, X)["fc"]
    return call.consumers


def test_torch_is_not_shadowed_by_this_folder():
    assert Path(__file__).parent not in Path(torch.__file__).parents


def test_consumers_are_those_of_the_run_not_of_the_registration():
    def run(net, x):
        return net.d(net.a(net.c(net.b(x))))

    model = Net(run, a=nn.ReLU(), b=nn.Linear(3, 3), c=nn.BatchNorm1d(3), d=nn.Linear(3, 1)).eval()
    calls = record(model, X)
    assert {name: [call.consumers for call in made] for name, made in calls.items()} == {
        "b": [[Consumer("c")]],
        "c": [[Consumer("a")]],
        "a": [[Consumer("d")]],
        "d": [[Consumer(None, OUTPUT)]],
    }


def test_names_are_qualified_and_a_root_layer_has_the_empty_name():
    assert list(record(nn.Sequential(nn.Sequential(nn.Linear(3, 3))), X)) == ["0.0"]
    assert record(nn.Linear(3, 3), X)[""][0].consumers == [Consumer(None, OUTPUT)]


def test_each_call_of_a_layer_is_recorded_and_an_uncalled_one_has_none():
    model = Net(lambda net, x: net.fc(net.fc(x)), fc=nn.Linear(3, 3), idle=nn.Linear(3, 3), norm=nn.BatchNorm1d(3))
    calls = record(model.eval(), X)
    assert [call.consumers for call in calls["fc"]] == [[Consumer("fc")], [Consumer(None, OUTPUT)]]
    assert calls["idle"] == calls["norm"] == []


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 5, 3)])
def test_the_rank_of_the_output_is_recorded(shape):
    assert record(nn.Linear(3, 4), torch.ones(shape))[""][0].output_ndim == len(shape)


@pytest.mark.parametrize(
    "use",
    [
        lambda net, y: (y + 1).sum(),
        lambda net, y: (1 - y).sum(),
        lambda net, y: y[0].sum(),
        lambda net, y: [row.sum() for row in y],
        lambda net, y: X if y.sum() > 0 else -X,
        lambda net, y: torch.cat([X, y]).sum(),
        lambda net, y: torch.where(X > 0, input=y, other=X).sum(),
        lambda net, y: F.linear(X, y),
        lambda net, y: torch.ops.aten.neg(y),
        lambda net, y: torch.tensor(y.tolist()),
        lambda net, y: torch.zeros(2, 3).add_(y),
        lambda net, y: y.data.sum(),
        lambda net, y: torch.from_numpy(y.numpy().copy()),
    ],
)
def test_each_use_by_a_function_counts_once(use):
    consumers = consumers_of_fc(use)
    assert len(consumers) == 1
    assert consumers[0].module is None
    assert consumers[0].function not in (None, OUTPUT)


@pytest.mark.parametrize("change", [lambda y: y.add_(1), lambda y: y.__iadd__(1), F.leaky_relu_])
def test_changing_a_tensor_in_place_is_a_use_and_so_is_what_comes_after(change):
    assert len(consumers_of_fc(lambda net, y: change(y))) == 2


@pytest.mark.parametrize(
    ("relu", "kind"),
    [
        (lambda y: F.relu(y, inplace=True), "relu"),
        (lambda y: F.relu(input=y, inplace=True), "relu"),
        (torch.relu_, "relu"),
        (F.relu_, "relu"),
        (lambda y: y.relu_(), "relu"),
        (lambda y: F.relu6(y, inplace=True), "relu6"),
        (lambda y: F.hardtanh_(y, 0, 6), "relu6"),
        (lambda y: F.hardtanh(y, 0.0, max_val=6.0, inplace=True), "relu6"),
        (nn.Hardtanh(0, 6, inplace=True), "relu6"),
    ],
)
def test_after_a_relu_in_place_the_tensor_is_no_longer_that_of_the_layer(relu, kind):
    (consumer,) = consumers_of_fc(lambda net, y: relu(y) + y.exp())
    assert (consumer.module, consumer.relu) == (None, kind)


def test_a_use_before_a_relu_in_place_counts_and_so_does_a_view():
    assert len(consumers_of_fc(lambda net, y: y.exp() + y.relu_())) == 2
    assert len(consumers_of_fc(lambda net, y: y.view(-1).relu_())) == 1
    (consumer,) = consumers_of_fc(lambda net, y: y.view(-1).relu_())
    assert consumer.relu == ""


@pytest.mark.parametrize(
    "use", [F.leaky_relu, F.hardtanh, lambda y: F.hardtanh(y, 0, 5), lambda y: F.hardtanh(y, max_val=6)]
)
def test_other_functions_are_no_relu(use):
    (consumer,) = consumers_of_fc(lambda net, y: use(y))
    assert consumer.relu == ""


def test_two_uses_in_one_function_count_twice():
    assert len(consumers_of_fc(lambda net, y: torch.cat([y, y]).sum())) == 2


@pytest.mark.parametrize(
    "wrap",
    [lambda y: y, lambda y: (y, 1), lambda y: {"a": [y]}, lambda y: [None, {"b": (y,)}]],
    ids=["tensor", "tuple", "dict", "nested"],
)
def test_the_output_of_the_model_is_a_consumer(wrap):
    assert consumers_of_fc(lambda net, y: wrap(y)) == [Consumer(None, OUTPUT)]


def test_reading_metadata_is_no_use():
    def use(net, y):
        assert (y.shape, y.size(0), len(y), y.ndim, y.dim(), y.numel()) == ((2, 3), 2, 2, 2, 2, 6)
        assert (y.dtype, y.device.type, y.is_contiguous(), y.is_floating_point()) == (torch.float32, "cpu", True, True)
        assert (y.stride(), y.is_cuda) == ((3, 1), False)
        return net.relu(y)

    assert consumers_of_fc(use, relu=nn.ReLU()) == [Consumer("relu")]


def test_keyword_arguments_of_modules_are_seen():
    assert consumers_of_fc(lambda net, y: net.norm(input=y), norm=nn.BatchNorm1d(3)) == [Consumer("norm")]


def test_what_a_module_does_inside_is_not_recorded():
    first, second = nn.Conv1d(1, 1, 3), nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular")
    calls = record(nn.Sequential(first, second), torch.ones(2, 1, 9))
    assert calls["0"][0].consumers == [Consumer("1")]


def test_modules_that_are_not_of_interest_are_looked_through():
    assert consumers_of_fc(lambda net, y: net.inner(y), inner=nn.Sequential(nn.Identity(), nn.ReLU())) == [
        Consumer("inner.1")
    ]
    (used,) = consumers_of_fc(lambda net, y: net.act(y), act=nn.Sigmoid())
    assert used == Consumer(None, torch.sigmoid)


def test_after_an_in_place_relu_the_tensor_is_that_of_the_relu():
    net = Net(lambda net, x: net.relu(net.fc(x)) + 1, fc=nn.Linear(3, 3), relu=nn.ReLU(inplace=True)).eval()
    calls = record(net, X)
    assert calls["fc"][0].consumers == [Consumer("relu")]
    assert [consumer.function for consumer in calls["relu"][0].consumers] == [torch.Tensor.add]


def test_recording_leaves_the_model_and_the_mode_as_they_were():
    model = ready(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU()), dtype=torch.float32)
    before = fingerprint(model)
    record(model, X)
    assert fingerprint(model) == before
    assert torch.is_grad_enabled()
    assert torch.overrides._get_current_function_mode_stack() == []


def test_recording_ends_also_when_the_model_fails():
    def run(net, x):
        net.fc(x)
        raise Broken

    model = Net(run, fc=nn.Linear(3, 3), relu=nn.ReLU()).eval()
    before = fingerprint(model)
    with pytest.raises(Broken):
        record(model, X)
    assert fingerprint(model) == before
    assert torch.overrides._get_current_function_mode_stack() == []


def test_a_layer_that_was_not_entered_is_not_left():
    """An earlier hook of the user's raises, and the model goes on."""

    def refuse(module, args):
        raise Broken

    def run(net, x):
        with contextlib.suppress(Broken):
            net.refused(x)
        return net.inner(x)

    inner = Net(lambda net, x: (net.fc(x) @ net.fc(x).T).exp(), fc=nn.Linear(3, 3))
    model = Net(run, refused=nn.Linear(3, 3), inner=inner).eval()
    model.refused.register_forward_pre_hook(refuse)
    seen = record_calls(model, lambda: model(X))
    assert seen.calls["refused"] == []
    assert [[use.function.__name__ for use in call.consumers] for call in seen.calls["inner.fc"]] == [
        ["matmul"], ["__get__"]
    ]  # fmt: skip
    assert seen.products == {Product("inner", "matmul", 0, "input other"): 1}


def test_parameters_that_others_use_are_seen_and_metadata_are_none():
    model = Net(lambda net, x: net.a(x) * net.b.weight.sum() + net.c.weight.shape[0], a=nn.Linear(3, 3),
                b=nn.Linear(3, 3), c=nn.Linear(3, 3)).eval()  # fmt: skip
    assert record_calls(model, lambda: model(X)).read == {"b"}


def test_no_activation_is_kept_alive():
    alive = []

    def run(net, x):
        alive.append(weakref.ref(net.a(x)))
        y = net.b(x)
        assert alive[0]() is None
        return y

    record(Net(run, a=nn.Linear(3, 3), b=nn.Linear(3, 3)).eval(), X)
    assert len(alive) == 1


def test_uses_of_a_parameter_are_counted_by_owner():
    a, b, c = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    b.weight = a.weight
    uses = count_uses(nn.Sequential(a, b, c, c))  # one module in two places owns its parameters once
    assert [uses[id(p)] for p in (a.weight, a.bias, b.bias, c.weight)] == [2, 1, 1, 1]
