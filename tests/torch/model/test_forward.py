import sys
from collections import OrderedDict, UserDict, namedtuple

import pytest
import torch
from torch import nn

from klquant.backends.batches import tracked
from klquant.backends.torch import (
    choose_criterion,
    collect_amax,
    collect_histograms,
    correct_bias,
    diagnose,
    equalize,
    examine,
    quantize,
)
from klquant.backends.torch.model.forward import call_model, check_eval, run_observed
from klquant.errors import InfeasibleError, InvalidInputError, ModelError
from support.networks import Broken, Net, batch, fingerprint, mlp, num_hooks

X = batch(5, 4, dtype=torch.float32)
Pair = namedtuple("Pair", "a b")


def seen(model, batches, **options):
    """Return what was observed as a list of (name, tensor)."""
    log = []
    run_observed(model, batches, lambda name, tensor: log.append((name, tensor)), **options)
    return log


@pytest.mark.parametrize(
    ("given", "args", "kwargs"),
    [
        (7, (7,), {}),
        ((1, 2), (1, 2), {}),
        ([1, 2], (1, 2), {}),
        (Pair(1, 2), (1, 2), {}),
        ({"a": 1, "b": 2}, (), {"a": 1, "b": 2}),
        (OrderedDict(b=2), (), {"b": 2}),
        (UserDict(a=1), (), {"a": 1}),
    ],
)
def test_batches_become_arguments(given, args, kwargs):
    assert call_model(lambda *a, **k: (a, k), given) == (args, kwargs)


def test_a_module_in_training_mode_is_refused_by_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout())).eval()
    check_eval(model)
    model[1][0].train()
    with pytest.raises(InvalidInputError, match=r"got 1\.0 in training mode; call model\.eval\(\)"):
        check_eval(model)
    with pytest.raises(InvalidInputError, match="got the model in training mode"):
        check_eval(nn.Linear(2, 2))


@pytest.mark.parametrize("what", [None, torch.relu, nn.Linear])
def test_only_modules_are_models(what):
    with pytest.raises(InvalidInputError, match=r"`model` must be a torch\.nn\.Module, got"):
        check_eval(what)


def test_inputs_are_what_enters_a_layer():
    model = mlp()
    (first, entering), (second, later) = seen(model, [X], observe="inputs")
    assert (first, second) == ("first", "second")
    assert torch.equal(entering, X)
    assert torch.equal(later, model.relu(model.norm(model.first(X))))


def test_outputs_are_what_leaves_a_layer():
    model = mlp()
    (_, leaving), (_, last) = seen(model, [X], observe="outputs")
    assert torch.equal(leaving, model.first(X))
    assert torch.equal(last, model(X))


def test_what_hooks_of_the_user_change_is_observed_changed():
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model[0].register_forward_hook(lambda module, args, output: output * 0)
    assert torch.equal(seen(model, [X], observe="inputs")[0][1], X * 2)
    assert not seen(model, [X], observe="outputs")[0][1].any()


def test_an_input_given_by_keyword_is_observed():
    model = Net(lambda net, x: net.fc(input=x), fc=nn.Linear(4, 4)).eval()
    assert torch.equal(seen(model, [X])[0][1], X)


def test_observed_tensors_carry_no_graph():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()

    def forward(model, x):
        assert not torch.is_grad_enabled()
        return model(x)

    assert not any(tensor.requires_grad for _, tensor in seen(model, [X.requires_grad_(False)], forward=forward))
    assert torch.is_grad_enabled()


def test_batches_are_taken_in_order_one_at_a_time():
    model = nn.Linear(4, 4).eval()
    log = []

    def batches():
        for k in range(3):
            log.append(("taken", k))
            yield X[k : k + 1]

    run_observed(model, batches(), lambda name, tensor: log.append(("seen", tensor)))
    assert [what for what, _ in log] == ["taken", "seen"] * 3
    assert torch.equal(torch.cat([tensor for what, tensor in log if what == "seen"]), X[:3])


@pytest.mark.parametrize("number", [0, 1, 3])
def test_the_number_of_batches_is_returned(number):
    assert run_observed(mlp(), iter([X] * number), lambda name, tensor: None) == number


TRAINING = {
    "collect_amax": lambda model: collect_amax(model, [X]),
    "collect_histograms": lambda model: collect_histograms(model, [X], {"first": 1.0, "second": 1.0}),
    "examine": lambda model: examine(model, X),
    "equalize": lambda model: equalize(model, X),
    "correct_bias": lambda model: correct_bias(model, model, [X]),
    "choose_criterion": lambda model: choose_criterion(model, {}, {"max": {}}, [X]),
    "diagnose": lambda model: diagnose(model, {}, {}, [X]),
    "quantize": lambda model: quantize(model, [X]),
}


@pytest.mark.parametrize("name", TRAINING)
def test_a_model_in_training_mode_is_not_run(name):
    model = mlp().train()
    with pytest.raises(InvalidInputError, match="eval mode"):
        TRAINING[name](model)
    assert model.norm.num_batches_tracked == 0


def test_what_is_no_float_tensor_is_refused_with_layer_and_batch():
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    with pytest.raises(InvalidInputError, match=r"layer `0`, batch 1: expected a float tensor, got torch\.int64"):
        seen(model, [X, torch.ones(2, 4, dtype=torch.int64)])
    model[0].register_forward_hook(lambda module, args, output: (output,))
    with pytest.raises(InvalidInputError, match="layer `0`, batch 0: expected a float tensor, got tuple"):
        seen(model, [X], observe="outputs")


def test_errors_of_the_observer_keep_their_class_and_name_layer_and_batch():
    def observer(name, tensor):
        if name == "second" and tensor.abs().max() > 10:
            raise InfeasibleError("too much")

    with pytest.raises(InfeasibleError, match="layer `second`, batch 1: too much") as caught:
        run_observed(mlp(), [X, 1000 * X], observer)
    assert str(caught.value.__cause__) == "too much"


@pytest.mark.parametrize("observe", ["inputs", "outputs"])
@pytest.mark.parametrize("where", ["nowhere", "forward", "batches", "observer"])
def test_hooks_come_off_whatever_happens(observe, where):
    model = mlp()
    before = fingerprint(model)
    counts = []

    def fail(place):
        counts.append(num_hooks(model))
        if place == where:
            raise Broken

    def batches():
        yield X
        fail("batches")
        yield X

    def forward(model, x):
        model(x)
        fail("forward")

    def run():
        run_observed(model, batches(), lambda name, tensor: fail("observer"), observe=observe, forward=forward)

    if where == "nowhere":
        run()
    else:
        with pytest.raises(Broken if where == "batches" else ModelError):
            run()
    assert set(counts) == {2}  # one for each layer, while it ran
    assert fingerprint(model) == before
    assert torch.is_grad_enabled()


def test_the_error_of_a_failing_model_is_chained_and_placed():
    with pytest.raises(ModelError, match="layer `first`, batch 1: the model failed there or later, with Ru"):
        seen(mlp(), [X, torch.ones(2, 5)])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        seen(mlp(), [torch.ones(2, 5)])
    assert type(caught.value.__cause__) is RuntimeError


def test_an_error_before_any_layer_names_the_batch():
    model = Net(lambda net, x: net.fc(x["a"]), fc=nn.Linear(4, 4)).eval()
    with pytest.raises(ModelError, match=r"^batch 7: the model failed there or later, with KeyError: 'a'"):
        seen(model, [({"b": X},)], first=7)


def test_an_interrupt_is_not_swallowed():
    def forward(model, x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        seen(mlp(), [X], forward=forward)


def test_layers_may_be_observed_in_different_places_or_not_at_all():
    model = mlp()
    ((name, tensor),) = seen(model, [X], observe={"second": "outputs"})
    assert name == "second"
    assert torch.equal(tensor, model(X))


def test_progress_is_silent_off_a_terminal(capfd):
    assert list(tracked([1, 2], "pass 1")) == [1, 2]
    assert capfd.readouterr() == ("", "")


def test_progress_is_shown_on_a_terminal(monkeypatch):
    written = []
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "write", lambda text: written.append(text) or len(text))
    monkeypatch.setenv("TERM", "xterm")
    assert list(tracked([1, 2], "pass 1: ranges")) == [1, 2]
    assert "pass 1: ranges" in "".join(written)
