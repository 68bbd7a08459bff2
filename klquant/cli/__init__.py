"""The command line: arguments in, tables out; the work is done elsewhere. One file per command."""

from .group import cli

__all__ = ["cli"]


def __dir__() -> list[str]:
    return __all__
