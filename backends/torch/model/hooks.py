"""Hooks and modes that always go again, also when Ctrl-C is pressed while they come or go."""

import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any


@contextmanager
def holding(contexts: Iterable[AbstractContextManager[Any]]) -> Iterator[None]:
    """Enter all contexts, such as the handles of hooks, and leave them at the end; meanwhile a Ctrl-C waits."""
    stack = ExitStack()
    with _staying_interrupts():
        try:
            with _uninterrupted():
                for context in contexts:
                    stack.enter_context(context)
            yield
        finally:
            try:
                with _uninterrupted():
                    stack.__exit__(*sys.exc_info())
            finally:
                stack.close()  # a Ctrl-C may have come just before that; what is closed stays so


@contextmanager
def _staying_interrupts() -> Iterator[None]:
    """Raise the Ctrl-C that led to an error: PyTorch's modes fail when they are left on account of one."""
    try:
        yield
    except Exception as error:
        if interrupt := _interrupt_behind(error):
            raise interrupt from None
        raise


def _interrupt_behind(error: BaseException | None) -> KeyboardInterrupt | None:
    while error:
        if isinstance(error, KeyboardInterrupt):
            return error
        error = error.__context__
    return None


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let a Ctrl-C wait until the end. It comes to the main thread only, and may be ignored or not Python's."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    pressed: list[Any] = []
    signal.signal(signal.SIGINT, lambda *arguments: pressed.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if pressed:
            handler(*pressed[-1])
