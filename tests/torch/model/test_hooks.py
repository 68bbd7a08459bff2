"""Hooks go again, whenever Ctrl-C is pressed."""

import signal
import threading
from contextlib import contextmanager

import pytest
from torch import nn

from klquant.backends.torch.model.hooks import holding
from support.networks import num_hooks


@pytest.fixture(autouse=True)
def heard():
    """Let Python hear of Ctrl-C; what a shell runs in the background does not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press():
    signal.raise_signal(signal.SIGINT)


def hooks(layer, meanwhile=lambda: None):
    yield layer.register_forward_hook(print)
    meanwhile()
    yield layer.register_forward_pre_hook(print)


def test_hooks_are_there_inside_only():
    layer = nn.ReLU()
    with holding(hooks(layer)):
        assert num_hooks(layer) == 2
    assert num_hooks(layer) == 0


def test_an_interrupt_waits_until_all_hooks_are_there_and_then_they_go():
    layer, seen = nn.ReLU(), []
    with pytest.raises(KeyboardInterrupt), holding(hooks(layer, lambda: (press(), seen.append(num_hooks(layer))))):
        seen.append("entered")
    assert seen == [1]
    assert num_hooks(layer) == 0


def test_an_interrupt_waits_until_all_hooks_are_gone():
    layer = nn.ReLU()

    @contextmanager
    def pressing():
        yield
        press()

    with pytest.raises(KeyboardInterrupt), holding([*hooks(layer), pressing()]):
        pass
    assert num_hooks(layer) == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_on_the_way_leaves_no_hook():
    layer = nn.ReLU()
    with pytest.raises(ZeroDivisionError), holding(hooks(layer, lambda: 1 / 0)):
        pass
    assert num_hooks(layer) == 0


def test_an_interrupt_behind_an_error_is_not_lost():
    def fails():
        try:
            press()
        finally:
            raise RuntimeError("in a clean-up")

    with pytest.raises(KeyboardInterrupt), holding([]):
        fails()


def test_an_interrupt_is_not_lost_where_the_clean_up_fails():
    @contextmanager
    def failing():
        try:
            yield
        finally:
            raise RuntimeError("on the way out")

    with pytest.raises(KeyboardInterrupt), holding([failing()]):
        press()


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_handlers_that_are_no_functions_are_left_alone(handler):
    signal.signal(signal.SIGINT, handler)
    with holding(hooks(nn.ReLU())):
        assert signal.getsignal(signal.SIGINT) is handler


def test_other_threads_hold_hooks_too():
    seen = []

    def run():
        with holding(hooks(layer := nn.ReLU())):
            seen.append(num_hooks(layer))
        seen.append(num_hooks(layer))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [2, 0]
