"""Errors of commands: one line on stderr and perhaps a hint; --debug adds the traceback."""

import errno
import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

import click

import klquant

WRONG, BUG, INTERRUPTED = 2, 3, 130  # exit codes: 2 as for click's usage errors, since 1 is an answer
_DEBUG = "klquant.debug"


def printable(text: str) -> str:
    """Return text with escapes in place of the characters that a terminal would obey or not show."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


class Failure(click.ClickException):
    """An error that is printed in one line."""

    exit_code = WRONG

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(printable(" ".join(message.split())))
        self.hint = hint

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the error, and the hint if there is one."""
        click.echo(f"Error: {self.message}", file=file, err=True)
        if self.hint:
            click.echo(f"Hint: {self.hint}", file=file, err=True)


def _remember(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[_DEBUG] = True  # shared by the contexts of a command and its group


debug_option = click.Option(
    ["--debug"], is_flag=True, is_eager=True, expose_value=False, callback=_remember,
    help="Show the traceback of an error.",
)  # fmt: skip


class Bug(Failure):
    """An unexpected error inside klquant."""

    exit_code = BUG

    def __init__(self, error: Exception) -> None:
        message = f"bug in klquant: {type(error).__name__}: {error}"
        super().__init__(message, "please report it with the output of --debug")


@contextmanager
def failing_in_one_line(ctx: click.Context) -> Iterator[None]:
    """Turn exceptions into a Failure, except for those that click handles well."""
    try:
        yield
    except KeyboardInterrupt:
        ctx.exit(INTERRUPTED)
    except (click.exceptions.Exit, click.Abort, Failure, click.exceptions.NoArgsIsHelpError):
        raise
    except click.UsageError as error:
        path = (error.ctx or ctx).command_path
        raise Failure(error.format_message(), f"see `{path} --help`") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            raise  # a reader such as `head` closed the pipe: click exits quietly
        if ctx.meta.get(_DEBUG):
            click.echo(traceback.format_exc(), err=True, nl=False)
        raise _failure(error, ctx.meta.get("klquant.options", {})) from error


def in_options(message: str, options: Mapping[str, str]) -> str:
    """Return a message about an argument of Python as one about the option of the command."""
    found = re.match(r"`(\w+)`(?= must| needs)", message)
    option = options.get(found[1]) if found else None
    if found and option:
        message = f"`{option}`{message[found.end() :]}"
    return message.replace("`batches`", "`--data`")


def _failure(error: Exception, options: Mapping[str, str]) -> Failure:
    match error:
        case klquant.MissingDependencyError():
            is_own = "klquant[cli]" in str(error)  # `doctor` itself needs that extra
            return Failure(str(error), "" if is_own else "`klquant doctor` shows what is installed")
        case klquant.ModelError():
            return Failure(str(error), "--debug shows the traceback")
        case klquant.KLQuantError():
            return Failure(in_options(str(error), options))
        case OSError():
            return Failure(f"`{error.filename}`: {error.strerror}" if error.filename else str(error))
        case MemoryError():
            return Failure(f"out of memory: {error}".removesuffix(": "), "try smaller batches")
    return Bug(error)
