"""The command `klquant`, which imports a subcommand only when it is used."""

import importlib
import shlex
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

import klquant

from .errors import debug_option, failing_in_one_line, printable

# Each command is a function in the module of its name. Summaries are here, so that --help imports no module.
COMMANDS = {
    "auto": "Quantize an ONNX model, verify the result and measure what it costs",
    "calibrate": "Calibrate an ONNX model on sample data",
    "quantize": "Quantize an ONNX model to INT8 with Q/DQ nodes",
    "smooth": "Change the weights of an ONNX model so that INT8 is more accurate",
    "tune": "Try settings until the INT8 model is accurate enough",
    "compare": "Compare an INT8 model with its float model: outputs, time and size",
    "inspect": "Show which nodes of an ONNX model an engine runs in INT8",
    "threshold": "Compare the criteria on a histogram or a calibration",
    "report": "Write an HTML report about a calibration",
    "convert": "Convert a calibration table to another format",
    "cache-to-qdq": "Quantize an ONNX model with a TensorRT calibration cache",
    "demo": "Quantize a small network and compare its accuracy",
    "doctor": "Show which extras work and how to install the others",
    "completion": "Print a shell completion script",
}


HELP = {"help_option_names": ["-h", "--help"]}


class _Group(click.Group):
    """Imports a command when it is used, and prints errors and warnings in one line each."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, _, others = super().resolve_command(ctx, args)
        command = _load(name) if name else None
        if command is not None:
            ctx.meta["klquant.options"] = {one.name: one.opts[0] for one in command.params if one.opts[0][0] == "-"}
        return name, command, others

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["klquant.arguments"] = list(args)  # for commands to paste
        with failing_in_one_line(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with failing_in_one_line(ctx), _short_warnings():
            return super().invoke(ctx)


_UNLOADED = {name: click.Command(name, short_help=summary) for name, summary in COMMANDS.items()}


@click.group(cls=_Group, commands=_UNLOADED, params=[debug_option], context_settings=HELP)
@click.version_option(klquant.__version__, "-V", "--version", prog_name="klquant")
def cli() -> None:
    """INT8 entropy (KL divergence) calibration: turn a float ONNX model into one that engines run in INT8.

    \b
    Example:
      klquant auto model.onnx --data photos/ --engine onnxruntime -o int8.onnx

    \b
    The same in steps:
      klquant calibrate model.onnx --data samples.npz --out calib.npz
      klquant quantize model.onnx calib.npz --engine tensorrt -o int8.onnx
      klquant inspect int8.onnx --engine tensorrt

    Results go to stdout, as JSON with --json. Warnings and progress bars go to stderr.

    \b
    Exit codes:
      0    success
      1    done, but the answer is no (see inspect --help)
      2    wrong usage or input, explained in one line on stderr
      3    a bug in klquant; please report the output of --debug
      130  interrupted
    """  # noqa: D301


def _load(name: str) -> click.Command:
    function = name.replace("-", "_")
    command: click.Command = getattr(needed(f"klquant.cli.commands.{function}", "cli"), function)
    if debug_option not in command.params:
        command.params.append(debug_option)
    return command


def needed(module: str, extra: str) -> Any:
    """Import a module that a command needs, or name the extra to install."""
    try:
        with _interrupts_delayed():
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "klquant":
            raise
        message = f"this command needs {error.name}: pip install 'klquant[{extra}]'"
        raise klquant.MissingDependencyError(message) from error


@contextmanager
def _interrupts_delayed() -> Iterator[None]:
    """Delay Ctrl-C to the end of the block: extension modules that are being loaded turn it into an ImportError."""
    if threading.current_thread() is not threading.main_thread():  # which alone receives Ctrl-C
        yield
        return
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if received:
            raise KeyboardInterrupt


def _with_options(warning: Warning | str) -> str:
    """Return a warning with the overrides to pass on the command line."""
    if not isinstance(warning, klquant.CalibrationWarning):
        return str(warning)
    options = " ".join(f"--override {shlex.quote(f'{name}={how}')}" for name, how in warning.better.items())
    message = warning.message.replace("pass a smaller max_amax, or a threshold", "pass a threshold: --override NAME=T")
    return message + (f"; to take the better criterion: {options}" if options else "")


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Print warnings of klquant in one line each on stderr, without a line of code."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", klquant.CalibrationWarning)
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, klquant.CalibrationWarning):
                from .output import say

                say(f"warning: {printable(_with_options(message))}", colour="yellow")
            else:
                others(message, category, *where, **more)

        warnings.showwarning = show
        yield
