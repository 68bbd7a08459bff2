"""The command `klquant` itself: finds its subcommands when they are asked for, and shows errors in one line."""

import errno
import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

import klquant

# Each is a function in the module of its name; its first sentence is here so that --help imports none of them.
COMMANDS = {
    "calibrate": "Observe an ONNX model on data and choose the thresholds of its tensors",
    "quantize": "Write an ONNX model with Q/DQ nodes from a calibration",
    "inspect": "Tell which nodes of an ONNX model an engine runs in INT8",
    "threshold": "Compare the criteria on a saved histogram or calibration",
    "report": "Write a calibration as one HTML page: thresholds, histograms, warnings",
    "convert": "Convert between the calibration tables of engines",
    "cache-to-qdq": "Write an ONNX model with Q/DQ nodes from a TensorRT calibration cache",
    "demo": "Calibrate and quantize a small trained network on real images",
}
INTERRUPTED = 130


class _Failure(click.ClickException):
    """An error in one line, with the exit code of click's own usage errors: 1 is an answer."""

    exit_code = 2


class _Group(click.Group):
    """Imports a command's module when the command is used, and shows errors and warnings in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        command: click.Command = getattr(needed(f"klquant.cli.{name}", "cli"), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _short_warnings():
                return super().invoke(ctx)
        except klquant.KLQuantError as error:
            raise _Failure(printable(" ".join(str(error).split()))) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # click ends quietly where a reader such as `head` went away
                raise
            message = f"`{error.filename}`: {error.strerror}" if error.filename else str(error)
            raise _Failure(printable(message)) from error
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)


@click.group(cls=_Group)
@click.version_option(klquant.__version__, prog_name="klquant")
def cli() -> None:
    """INT8 entropy (KL-divergence) calibration, from a float ONNX model to one that engines run in INT8.

    \b
    Example:
      klquant calibrate model.onnx --data samples.npz --out calib.npz
      klquant quantize model.onnx calib.npz --profile tensorrt -o int8.onnx
      klquant inspect int8.onnx --engine tensorrt

    Results go to stdout, with --json as JSON alone; warnings and progress bars go to stderr.

    \b
    Exit codes:
      0    done, and as asked for
      1    an answer: what was asked for is not so (see inspect --help)
      2    wrong usage or input; one line on stderr says which
      130  interrupted
    """  # noqa: D301


def needed(module: str, extra: str) -> Any:
    """Import what a command needs, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "klquant":
            raise
        message = f"this command needs {error.name}: pip install 'klquant[{extra}]'"
        raise klquant.MissingDependencyError(message) from error


def printable(text: str) -> str:
    """Return text in which what a terminal would obey, or not show, stands as its escape."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Show klquant's own warnings in one line each on stderr, without the line of code that they point at."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", klquant.CalibrationWarning)
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, klquant.CalibrationWarning):
                click.echo(f"warning: {printable(str(message))}", err=True)
            else:
                others(message, category, *where, **more)

        warnings.showwarning = show
        yield
