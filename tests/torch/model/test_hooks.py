"""Hooks and modes last as long as a block, however it ends."""

import signal
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from klquant.backends.torch import choose_criterion, collect_amax, diagnose, equalize, examine, quantize
from klquant.backends.torch.model.hooks import active
from klquant.errors import ModelError
from support.networks import Broken, batch, fingerprint, mlp, num_hooks


@pytest.fixture(autouse=True)
def ctrl_c():
    """Make Ctrl-C raise KeyboardInterrupt: Python ignores it where a shell has started it in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press():
    signal.raise_signal(signal.SIGINT)


def fail():
    raise Broken


ENDS = {"error": (fail, Broken), "Ctrl-C": (press, KeyboardInterrupt)}
each_end = pytest.mark.parametrize(("end", "raised"), ENDS.values(), ids=ENDS)


def hooks(layer, meanwhile=lambda: None):
    yield layer.register_forward_hook(print)
    meanwhile()
    yield layer.register_forward_pre_hook(print)


def test_hooks_are_there_inside_only():
    layer = nn.ReLU()
    with active(hooks(layer)):
        assert num_hooks(layer) == 2
    assert num_hooks(layer) == 0


@each_end
def test_the_end_of_a_block_takes_hooks_and_modes_away(end, raised):
    layer = nn.ReLU()
    with pytest.raises(raised), active([*hooks(layer), torch.no_grad(), torch.overrides.BaseTorchFunctionMode()]):
        end()
    assert_nothing_is_left(layer)


@each_end
def test_what_goes_wrong_between_two_hooks_takes_the_first_away(end, raised):
    layer = nn.ReLU()
    with pytest.raises(raised), active(hooks(layer, end)):
        pytest.fail("entered")
    assert num_hooks(layer) == 0


@each_end
def test_what_goes_wrong_in_one_end_does_not_keep_the_others_from_theirs(end, raised):
    layer = nn.ReLU()

    @contextmanager
    def ending():
        yield
        end()

    with pytest.raises(raised), active([*hooks(layer), ending()]):
        pass
    assert num_hooks(layer) == 0


def assert_nothing_is_left(model):
    assert num_hooks(model) == 0
    assert torch.is_grad_enabled()
    assert torch.overrides._get_current_function_mode_stack() == _get_current_dispatch_mode_stack() == []


DATA = [batch(40, 4, dtype=torch.float32)]


def quantized(**options):
    result = quantize(mlp(), DATA, criterion="max", num_bins=255, **options)
    return result.weight_scales, result.thresholds


RUNS = {
    "examine": lambda model, forward: examine(model, DATA[0], forward=forward),
    "equalize": lambda model, forward: equalize(model, DATA[0], forward=forward),
    "collect_amax": lambda model, forward: collect_amax(model, DATA, forward=forward),
    "quantize": lambda model, forward: quantize(model, DATA, forward=forward),
    "diagnose": lambda model, forward: diagnose(model, *quantized(), DATA, forward=forward),
    "choose_criterion": lambda model, forward: choose_criterion(
        model, quantized()[0], {"max": quantized()[1]}, DATA, forward=forward
    ),
}


@each_end
@pytest.mark.parametrize("name", RUNS)
def test_whatever_ends_a_run_the_model_is_as_before(name, end, raised):
    model = mlp()
    before = fingerprint(model)

    def forward(net, x):
        net(x)
        end()

    with pytest.raises((raised, ModelError) if raised is Broken else raised):
        RUNS[name](model, forward)
    assert fingerprint(model) == before
    assert_nothing_is_left(model)
