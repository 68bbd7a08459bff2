"""``klquant doctor``: what is installed, and what it is good for."""

import sys

import click

from ..environment import Environment, examine
from ..options import json_option
from ..output import busy, print_json, print_table


@click.command()
@json_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Tell what is installed, and which features it makes usable.

    Every library that klquant may use is imported, in a process of its own: one that is broken is told, and stops
    nothing. The exit code is 0, or 1 if not even the core is usable.

    \b
    Example:
      klquant doctor
      klquant doctor --json
    """  # noqa: D301
    with busy("importing libraries"):
        found = examine()
    if as_json:
        tables = {name: [one._asdict() for one in getattr(found, name)] for name in ("packages", "features")}
        print_json({**found._asdict(), "executable": sys.executable, **tables})
    else:
        _print(found)
    if not found.features[0].usable:
        ctx.exit(1)


def _print(found: Environment) -> None:
    click.echo(f"klquant {found.versions['klquant']}, Python {found.versions['python']}: {sys.executable}")
    click.echo(f"{found.versions['system']}; {found.cpu}")
    click.echo(f"INT8 instructions: {', '.join(found.instructions) or 'none that the system tells of'}")
    if "AVX2" in found.instructions and "VNNI" not in found.instructions:
        click.echo("Without VNNI onnxruntime's INT8 kernels saturate; `klquant quantize --reduce-range` avoids it.")
    packages = [(one.name, one.minimum, one.version or "", one.problem or "ok") for one in found.packages]
    print_table("\npackages", ("package", "needed", "installed", "state"), packages)
    devices = [(one.name, device) for one in found.packages for device in one.devices]
    print_table("\ndevices", ("package", "device"), devices)
    features = [(one.what, "yes" if one.usable else "no", one.install) for one in found.features]
    print_table("\nfeatures", ("feature", "usable", "to make it so"), features)
