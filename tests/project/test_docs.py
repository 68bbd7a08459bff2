"""The documentation site builds without warnings, and its API reference has every public name."""

import importlib
import os
import subprocess
import sys
import zlib
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_AN_API = {"klquant.cli", "klquant.demo"}  # used through the command `klquant`

pytestmark = [
    pytest.mark.skipif(not (ROOT / "klquant").is_dir(), reason="needs the source tree"),
    pytest.mark.skipif(not find_spec("mkdocstrings") or not find_spec("material"), reason="needs the extra `docs`"),
]


def public_modules():
    """Return the modules of the core and of the backends that declare their names by `__all__`."""
    found = ["klquant"]
    for folder, package in [(ROOT / "klquant", "klquant"), (ROOT / "backends", "klquant.backends")]:
        for path in sorted(folder.glob("*")):  # empty next to an installed wheel
            source = path / "__init__.py" if path.is_dir() else path
            name = f"{package}.{path.stem}"
            if path.stem.startswith("_") or name in NOT_AN_API or source.suffix != ".py" or not source.is_file():
                continue
            if "\n__all__ = " in source.read_text(encoding="utf-8"):
                found.append(name)
    return found


@pytest.fixture(scope="module")
def inventory(tmp_path_factory):
    """Build the site, and return the names that its pages document, from the inventory for other sites."""
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", site]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    return {line.partition(" py:")[0] for line in zlib.decompress(packed).decode().splitlines()}


def undocumented(module, inventory):
    """Return the public names of a module that are neither under that module nor where they are defined."""
    names = {name: getattr(module, name) for name in module.__all__}
    defined = {name: f"{getattr(thing, '__module__', None)}.{name}" for name, thing in names.items()}
    return [name for name in names if not {f"{module.__name__}.{name}", defined[name]} & inventory]


@pytest.mark.parametrize("name", public_modules())
def test_every_public_name_is_documented(name, inventory):
    assert undocumented(importlib.import_module(name), inventory) == []


def test_public_modules_are_found():
    assert {"klquant", "klquant.presets", "klquant.backends.torch", "klquant.backends.onnx"} <= set(public_modules())


def test_a_missing_name_is_noticed(inventory):
    import klquant

    missing = {"klquant.smooth", "klquant.divergence.smooth"}
    assert missing & inventory
    assert undocumented(klquant, inventory - missing) == ["smooth"]


def test_the_site_loads_nothing_from_elsewhere():
    """Material would load its fonts from Google."""
    assert "font: false" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
