"""A Ctrl-C stays one, also where the clean-up that it causes fails."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def not_replaced(*kinds: type[BaseException]) -> Iterator[None]:
    """Raise the error of one of these kinds that led to another one, in place of that."""
    try:
        yield
    except Exception as error:
        if cause := _behind(error, kinds):
            raise cause from None
        raise


def _behind(error: BaseException | None, kinds: tuple[type[BaseException], ...]) -> BaseException | None:
    while error and not isinstance(error, kinds):
        error = error.__context__
    return error
