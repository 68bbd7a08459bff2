"""The command line. It parses arguments and prints results; the work is done in the other packages."""

from .group import cli

__all__ = ["cli"]


def __dir__() -> list[str]:
    return __all__
