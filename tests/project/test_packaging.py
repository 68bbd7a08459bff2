import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

import klquant

ROOT = Path(__file__).parents[2]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]

pytestmark = pytest.mark.skipif(not (ROOT / "klquant").is_dir(), reason="needs the source tree")


def import_name(folder):
    """Return the package name of a folder: `backends` is installed as `klquant.backends`."""
    name = ".".join(folder.relative_to(ROOT).parts)
    return name if name.partition(".")[0] == "klquant" else f"klquant.{name}"


def packages():
    return {path.parent for top in ("klquant", "backends") for path in (ROOT / top).rglob("*.py")}


def test_every_folder_with_python_files_is_packaged():
    assert sorted(SETUPTOOLS["packages"]) == sorted(import_name(folder) for folder in packages())


def test_every_package_has_an_init_file():
    assert all((folder / "__init__.py").is_file() for folder in packages())


def test_every_package_is_looked_for_where_it_lies():
    mapping = SETUPTOOLS["package-dir"]
    for folder in packages():
        package = import_name(folder)
        parent = package
        while parent not in mapping:
            parent = parent.rpartition(".")[0]
        assert ROOT / mapping[parent] / package[len(parent) + 1 :].replace(".", "/") == folder


def test_the_source_distribution_has_all_tests_and_pages():
    """setuptools takes the packages; MANIFEST.in names the rest. `.ci/run` builds it."""
    lines = (ROOT / "MANIFEST.in").read_text(encoding="utf-8").split("\n")
    assert {"graft tests", "graft property_tests", "graft docs"} <= set(lines)


def test_versions_agree():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{klquant.__version__}"' in text
    assert f"## {klquant.__version__} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_data_file_is_packaged():
    patterns = SETUPTOOLS["package-data"]
    for folder in packages():
        data = [path.name for path in folder.iterdir() if path.is_file() and path.suffix not in {".py", ".pyc"}]
        missing = [name for name in data if not any(fnmatch(name, p) for p in patterns.get(import_name(folder), []))]
        assert not missing
