"""The command `klquant` itself: finds its subcommands when they are asked for."""

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

import klquant

from .errors import debug_option, failing_in_one_line, printable

# Each is a function in the module of its name. Its summary is here too, so that --help imports none of the modules.
COMMANDS = {
    "calibrate": "Observe an ONNX model on data and choose the thresholds of its tensors",
    "quantize": "Write an ONNX model with Q/DQ nodes from a calibration",
    "inspect": "Tell which nodes of an ONNX model an engine runs in INT8",
    "threshold": "Compare the criteria on a saved histogram or calibration",
    "report": "Write a calibration as one HTML page: thresholds, histograms, warnings",
    "convert": "Convert between the calibration tables of engines",
    "cache-to-qdq": "Write an ONNX model with Q/DQ nodes from a TensorRT calibration cache",
    "demo": "Calibrate and quantize a small trained network on real images",
    "doctor": "Show which extras of klquant are usable, and how to install the others",
    "completion": "Print the script that makes a shell complete commands and names",
}


class _Group(click.Group):
    """Imports the module of a command when the command is used; shows errors and warnings in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, _, others = super().resolve_command(ctx, args)
        return name, _load(name) if name else None, others

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with failing_in_one_line(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with failing_in_one_line(ctx), _short_warnings():
            return super().invoke(ctx)


_UNLOADED = {name: click.Command(name, short_help=summary) for name, summary in COMMANDS.items()}


@click.group(cls=_Group, commands=_UNLOADED, params=[debug_option])
@click.version_option(klquant.__version__, prog_name="klquant")
def cli() -> None:
    """INT8 entropy (KL-divergence) calibration, from a float ONNX model to one that engines run in INT8.

    \b
    Example:
      klquant calibrate model.onnx --data samples.npz --out calib.npz
      klquant quantize model.onnx calib.npz --engine tensorrt -o int8.onnx
      klquant inspect int8.onnx --engine tensorrt

    Results go to stdout, with --json as JSON alone; warnings and progress bars go to stderr.

    \b
    Exit codes:
      0    done, and as asked for
      1    an answer: what was asked for is not so (see inspect --help)
      2    wrong usage or input; one line on stderr says which
      3    a bug of klquant; please report what --debug shows
      130  interrupted
    """  # noqa: D301


def _load(name: str) -> click.Command:
    function = name.replace("-", "_")
    command: click.Command = getattr(needed(f"klquant.cli.commands.{function}", "cli"), function)
    if debug_option not in command.params:
        command.params.append(debug_option)
    return command


def needed(module: str, extra: str) -> Any:
    """Import what a command needs, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "klquant":
            raise
        message = f"this command needs {error.name}: pip install 'klquant[{extra}]'"
        raise klquant.MissingDependencyError(message) from error


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
