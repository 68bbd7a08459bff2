"""Hooks and modes that last as long as a block."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any


@contextmanager
def active(contexts: Iterable[AbstractContextManager[Any]]) -> Iterator[None]:
    """Enter all contexts, such as the handles of hooks, and leave them when the block ends, also by an error or Ctrl-C.

    An error while they are entered leaves those that were.
    """
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
