import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from klquant.backends.torch import collect_amax, collect_histograms
from klquant.backends.torch.folding.api import examine
from klquant.backends.torch.folding.apply import apply_folds
from klquant.backends.torch.folding.verify import verified_forward, verify_folds
from klquant.backends.torch.model.forward import call_model
from klquant.errors import InvalidInputError
from support.networks import Broken, Net, batch, fingerprint, is_same, outputs, ready

UP, DOWN = batch(5, 4).abs(), -batch(5, 4).abs()
NORM, RELU = "BatchNorm `norm`", "the ReLU that"


def branching(usual, other, **modules):
    """Return a network that does as usual on UP and something else on DOWN."""

    def run(net, x):
        return usual(net, x) if x.sum() > 0 else other(net, x)

    parts = {"fc": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4), "relu": nn.ReLU(), "second": nn.Linear(4, 4)}
    return ready(Net(run, **{**parts, **modules}))


def folded(model, x=UP):
    folds = examine(model, x).folds
    return apply_folds(model, folds), folds


def normed(net, x):
    return net.norm(net.fc(x))


def joined(net, x):
    return F.relu(net.fc(x))


def again(net, x):
    y = net.fc(x)
    return net.norm(y) + y


def run_and_break(model, x):
    model(x)
    raise Broken


WRONG = {
    "norm not called": (normed, lambda net, x: net.fc(x), "`fc`.*BatchNorm `norm`.*got output"),
    "norm of something else": (normed, lambda net, x: net.norm(x), "`norm`.*got 1 calls after 0"),
    "norm of another layer": (normed, lambda net, x: net.norm(net.second(x)), "got 1 calls after 0"),
    "norm of something between": (normed, lambda net, x: net.norm(net.fc(x) * 2), "got mul"),
    "used before the norm too": (normed, lambda net, x: [y := net.fc(x), y.exp() + net.norm(y)][1], "got exp, norm"),
    "used after the norm too": (normed, again, "got norm, add"),
    "layer output thrown away": (normed, lambda net, x: [net.fc(x), x][1], "got no use"),
    "layer output goes to a layer": (normed, lambda net, x: net.second(net.fc(x)), "got linear"),
    "norm called again": (normed, lambda net, x: net.norm(normed(net, x)), "got 2 calls after 1"),
    "norm twice on one output": (normed, lambda net, x: [y := net.fc(x), net.norm(y) + net.norm(y)][1], "norm, norm"),
    "weight used elsewhere": (
        normed,
        lambda net, x: normed(net, x) + F.linear(x, net.fc.weight),
        "no other function uses its weights, which contain the BatchNorm `norm`",
    ),
    "other dimensions": (normed, lambda net, x: net.norm(net.fc(x[:4, None].expand(4, 4, 4))), "outputs of 2 dim"),
    "relu not called": (joined, lambda net, x: net.fc(x), "`fc`.*the ReLU.*got output"),
    "another activation": (joined, lambda net, x: net.fc(x).tanh(), "got tanh"),
    "another relu": (joined, lambda net, x: F.relu6(net.fc(x)), "got relu6"),
    "used beside the relu": (joined, lambda net, x: [y := net.fc(x), F.relu(y) - y][1], "got relu, sub"),
    "relu of a view in place": (joined, lambda net, x: [y := net.fc(x), y[0].relu_(), y][2], "__getitem__, output"),
    "relu after the norm missing": (lambda net, x: net.relu(normed(net, x)), normed, "`fc`.*the ReLU.*got output"),
    "norm before the relu missing": (lambda net, x: net.relu(normed(net, x)), joined, "`fc`.*`norm`.*got relu"),
    "norm and relu swapped": (lambda net, x: net.relu(normed(net, x)), lambda net, x: net.norm(joined(net, x)), "relu"),
}
RIGHT = {
    "weight used elsewhere, only a relu folded": (joined, lambda net, x: joined(net, x) + F.linear(x, net.fc.weight)),
    "both called twice": (normed, lambda net, x: normed(net, normed(net, x))),
    "neither called": (normed, lambda net, x: net.second(x)),
    "norm output used twice": (normed, lambda net, x: [y := normed(net, x), y + y.exp()][1]),
    "norm output changed in place": (normed, lambda net, x: [y := normed(net, x), y.add_(1), y * 2][2]),
    "another form of the relu": (joined, lambda net, x: net.relu(net.fc(x))),
    "in place, used twice": (joined, lambda net, x: [y := net.fc(x), y.relu_(), y + y][2]),
    "norm and another relu": (
        lambda net, x: net.relu(normed(net, x)),
        lambda net, x: net.second(normed(net, x).relu_()),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_batch_on_which_the_folds_are_wrong_is_refused(case):
    usual, other, message = WRONG[case]
    model = branching(usual, other)
    quick, folds = folded(model)
    assert any(not fold.reason for fold in folds)
    run = verified_forward(call_model, folds)
    assert is_same(run(quick, UP).detach(), outputs(quick, UP))
    with pytest.raises(InvalidInputError, match=message):
        run(quick, DOWN)


@pytest.mark.parametrize("case", RIGHT)
def test_a_batch_on_which_they_are_right_is_not(case):
    usual, other = RIGHT[case]
    model = branching(usual, other)
    quick, folds = folded(model)
    assert any(not fold.reason for fold in folds)
    with torch.no_grad():
        got = verified_forward(call_model, folds)(quick, DOWN)
    torch.testing.assert_close(got, outputs(model, DOWN))
    assert is_same(got, outputs(quick, DOWN))


def test_several_runs_can_be_verified_together():
    model = branching(joined, lambda net, x: net.fc(x))
    quick, folds = folded(model)
    with verify_folds(quick, folds):
        quick(UP)
        quick(UP)
    with pytest.raises(InvalidInputError, match="`fc`"), verify_folds(quick, folds):
        [quick(x) for x in (UP, DOWN, UP)]


@pytest.mark.parametrize("observe", ["inputs", "outputs"])
def test_observers_are_no_use(observe):
    model = branching(lambda net, x: net.second(net.relu(normed(net, x))), None)
    quick, folds = folded(model)
    assert sum(not fold.reason for fold in folds) == 2
    forward = verified_forward(call_model, folds)
    amax = collect_amax(quick, [UP], observe=observe, forward=forward)
    assert amax == collect_amax(quick, [UP], observe=observe)
    got = collect_histograms(quick, [UP], amax, observe=observe, forward=forward)
    assert got.keys() == {"fc", "second"}


def test_a_branch_of_a_later_batch_is_refused_in_the_passes():
    quick, folds = folded(branching(joined, lambda net, x: net.fc(x)))
    with pytest.raises(InvalidInputError, match="layer `fc`"):
        collect_amax(quick, [UP, DOWN], forward=verified_forward(call_model, folds))


def test_the_batch_that_shows_the_branch_decides_rightly():
    model = branching(joined, lambda net, x: net.fc(x))
    quick, folds = folded(model, DOWN)
    assert folds == [folds[0]]
    assert folds[0].reason == "never called"
    assert verified_forward(call_model, folds) is call_model
    assert is_same(outputs(quick, UP), outputs(model, UP))


def test_two_norms_in_a_row_are_verified():
    model = ready(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)))
    once, folds = folded(model)
    again, more = folded(once)
    assert is_same(verified_forward(call_model, folds[:1] + more)(again, UP).detach(), outputs(again, UP))


def test_the_model_is_as_before_whatever_happens():
    model = branching(lambda net, x: net.relu(normed(net, x)), lambda net, x: net.fc(x))
    quick, folds = folded(model)
    before = fingerprint(quick)
    run = verified_forward(call_model, folds)
    run(quick, UP)
    with pytest.raises(InvalidInputError):
        run(quick, DOWN)
    with pytest.raises(Broken):
        verified_forward(run_and_break, folds)(quick, DOWN)
    assert fingerprint(quick) == before
    assert torch.overrides._get_current_function_mode_stack() == []


def test_modules_in_plain_lists_are_verified_too():
    model = branching(lambda net, x: net.stages[1](net.stages[0](x)), lambda net, x: net.stages[0](x))
    model.stages = [model.fc, model.norm]
    quick, folds = folded(model)
    run = verified_forward(call_model, folds)
    torch.testing.assert_close(run(quick, UP).detach(), outputs(model, UP))
    with pytest.raises(InvalidInputError, match="BatchNorm `norm`"):
        run(quick, DOWN)


def test_gradients_flow_through_a_verified_model():
    quick, folds = folded(branching(normed, None))
    verified_forward(call_model, folds)(quick, UP).sum().backward()
    got = copy.deepcopy(quick.fc.weight.grad)
    quick.zero_grad()
    quick(UP).sum().backward()
    assert is_same(got, quick.fc.weight.grad)
