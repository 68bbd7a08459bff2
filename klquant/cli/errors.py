"""How a command fails: in one line on stderr, with a hint below where one helps; --debug shows the traceback."""

import errno
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import click

import klquant

WRONG, BUG, INTERRUPTED = 2, 3, 130  # exit codes; 2 is that of click's own usage errors: 1 is an answer
_DEBUG = "klquant.debug"


def printable(text: str) -> str:
    """Return text in which what a terminal would obey, or not show, stands as its escape."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


class Failure(click.ClickException):
    """An error in one line."""

    exit_code = WRONG

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(printable(" ".join(message.split())))
        self.hint = hint

    def show(self, file: IO[Any] | None = None) -> None:
        """Print it."""
        click.echo(f"Error: {self.message}", file=file, err=True)
        if self.hint:
            click.echo(f"Hint: {self.hint}", file=file, err=True)


def _remember(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[_DEBUG] = True  # which the contexts of a command and its group share


debug_option = click.Option(
    ["--debug"], is_flag=True, is_eager=True, expose_value=False, callback=_remember,
    help="Show the traceback of an error.",
)  # fmt: skip


class Bug(Failure):
    """An error that is klquant's own."""

    exit_code = BUG

    def __init__(self, error: Exception) -> None:
        message = f"this is a bug of klquant: {type(error).__name__}: {error}"
        super().__init__(message, "--debug shows where; please report that")


@contextmanager
def failing_in_one_line(ctx: click.Context) -> Iterator[None]:
    """Turn what is raised in the block into a Failure, but for what click handles well."""
    try:
        yield
    except KeyboardInterrupt:
        ctx.exit(INTERRUPTED)
    except (click.exceptions.Exit, click.Abort, Failure, click.exceptions.NoArgsIsHelpError):
        raise
    except click.UsageError as error:
        path = (error.ctx or ctx).command_path
        raise Failure(error.format_message(), f"`{path} --help` tells what it takes") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            raise  # click ends quietly where a reader such as `head` went away
        if ctx.meta.get(_DEBUG):
            click.echo(traceback.format_exc(), err=True, nl=False)
        raise _failure(error) from error


def _failure(error: Exception) -> Failure:
    match error:
        case klquant.MissingDependencyError():
            is_own = "klquant[cli]" in str(error)  # without which there is no doctor
            return Failure(str(error), "" if is_own else "`klquant doctor` tells what is installed, and for what")
        case klquant.ModelError():
            return Failure(str(error), "--debug shows where")
        case klquant.KLQuantError():
            return Failure(str(error))
        case OSError():
            return Failure(f"`{error.filename}`: {error.strerror}" if error.filename else str(error))
        case MemoryError():
            return Failure(f"out of memory: {error}".removesuffix(": "), "smaller batches take less")
    return Bug(error)
