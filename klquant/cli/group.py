"""The command `klquant` itself: finds its subcommands when they are asked for, and shows errors in one line."""

import importlib
from typing import Any

import click

import klquant

COMMANDS = ("demo",)  # each is a function in the module of its name


class _Group(click.Group):
    """Imports a command's module when the command is used, and shows klquant's own errors in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"klquant.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except klquant.KLQuantError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group)
@click.version_option(klquant.__version__, prog_name="klquant")
def cli() -> None:
    """INT8 entropy (KL-divergence) calibration."""


def needed(module: str, extra: str) -> Any:
    """Import what a command needs, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        message = f"this command needs {error.name}: pip install 'klquant[{extra}]'"
        raise klquant.MissingDependencyError(message) from error
