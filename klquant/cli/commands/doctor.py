"""``klquant doctor``: which extras are usable, from the metadata of the installed packages."""

import platform
import re
import sys
import textwrap
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import click

from ..options import json_option
from ..output import print_json, print_table

HIDDEN = {"all", "dev", "docs"}  # they combine other extras, or are for developers of klquant
OPENVINO = "openvino"  # for `inspect --engine openvino`; in no extra
CPU = Path("/proc/cpuinfo")  # of Linux
_REQUIREMENT = re.compile(r"""([\w.-]+)(?:\[([\w,-]+)\])?(?:>=([\d.]+))?(?:.*extra == ["']([\w-]+)["'])?""")


class Package(NamedTuple):
    """A package that klquant or one of its extras needs."""

    name: str
    needed: str
    """The oldest version that works; empty for any."""
    installed: str
    """Empty if it is missing."""

    @property
    def is_usable(self) -> bool:
        """Whether it is installed and new enough."""
        installed, needed = ([int(part) for part in re.findall(r"\d+", text)] for text in (self.installed, self.needed))
        return bool(self.installed) and installed >= needed

    def __str__(self) -> str:
        """Return its name and version, and what is needed instead."""
        needed = f" (needs {self.needed})" if self.needed and not self.is_usable else ""
        return f"{self.name} {self.installed or 'missing'}{needed}"


class Extra(NamedTuple):
    """An extra of klquant, or klquant itself without a name."""

    name: str
    usable: bool
    packages: list[Package]
    install: str
    """The command that makes it usable; empty if it is."""


@click.command()
@json_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Show which extras work and how to install the others.

    Versions come from package metadata; no library is imported. The exit code is 0, or 1 if NumPy is too old.

    \b
    Example:
      klquant doctor
      klquant doctor --json
    """  # noqa: D301
    system = {"klquant": metadata.version("klquant"), "python": platform.python_version()}
    system |= {"executable": sys.executable, "system": platform.platform()}
    extras = [_extra(name, list(dict.fromkeys(_packages(name)))) for name in ("", *_names())]
    extras.append(_extra(OPENVINO, [_package(OPENVINO)]))
    if as_json:
        print_json({**system, "extras": extras})
    else:
        click.echo("klquant {klquant}, Python {python}: {executable}\n{system}".format(**system))
        _print_vnni_hint()
        rows = (row for extra in extras for row in _rows(extra))
        print_table("extras", ("extra", "usable", "packages", "install with"), rows)
    if not extras[0].usable:
        ctx.exit(1)


def _names() -> list[str]:
    declared = metadata.metadata("klquant").get_all("Provides-Extra") or []
    return [name for name in declared if name not in HIDDEN]


def _packages(extra: str) -> Iterator[Package]:
    """Yield the packages that an extra needs, with those of the extras that it names."""
    for line in metadata.requires("klquant") or ():
        name, nested, needed, of = _REQUIREMENT.findall(line)[0]
        if of == extra and name == "klquant":
            yield from (package for other in nested.split(",") for package in _packages(other))
        elif of == extra:
            yield _package(name, needed)


def _package(name: str, needed: str = "") -> Package:
    """Look a package up by its name, or by its module, which onnxruntime-gpu and onnxruntime share."""
    try:
        return Package(name, needed, metadata.version(name))
    except metadata.PackageNotFoundError:
        others = metadata.packages_distributions().get(name, ())
        return Package(name, needed, next(map(metadata.version, others), ""))


def _extra(name: str, packages: list[Package]) -> Extra:
    usable = all(package.is_usable for package in packages)
    what = "klquant" if not name else name if name == OPENVINO else f"'klquant[{name}]'"
    return Extra(name, usable, packages, "" if usable else f"pip install -U {what}")


def _rows(extra: Extra) -> Iterator[tuple[str, ...]]:
    """Yield the row of an extra, and more rows for packages that do not fit into it."""
    packages = ", ".join(str(package).replace(" ", "\0") for package in extra.packages)  # kept together
    first, *others = textwrap.wrap(packages, 60)
    yield extra.name or "(core)", "yes" if extra.usable else "no", first.replace("\0", " "), extra.install
    for more in others:
        yield "", "", more.replace("\0", " "), ""


def _print_vnni_hint() -> None:
    flags = set(CPU.read_text(encoding="utf-8").split()) if CPU.is_file() else set()
    if "avx2" in flags and not flags & {"avx512_vnni", "avx_vnni"}:
        click.echo(
            "this CPU lacks VNNI: for onnxruntime, use `klquant quantize --reduce-range` to avoid saturated sums"
        )
