"""`klquant doctor`: which extras are usable if packages are installed, missing or too old."""

import json
import re
import subprocess
import sys
from importlib import metadata

import pytest
from click.testing import CliRunner

import klquant
from klquant.cli import cli


def run(*arguments):
    return CliRunner().invoke(cli, ["doctor", *arguments], catch_exceptions=False)


def extras():
    """Return what `klquant doctor` finds, by name."""
    result = run("--json")
    assert result.stderr == ""
    return {extra["name"]: extra for extra in json.loads(result.stdout)["extras"]}


def unusable():
    return {name for name, extra in extras().items() if not extra["usable"]}


@pytest.fixture
def installed(monkeypatch):
    """Pretend that all packages have version 999, except for those in this dict; None means missing."""
    versions = {"klquant": klquant.__version__}

    def version(name):
        found = versions.get(name, "999")
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "packages_distributions", dict)
    return versions


def test_this_machine_is_described_as_it_is():
    result = run("--json")
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert (found["klquant"], found["executable"]) == (klquant.__version__, sys.executable)
    packages = {package["name"]: package for extra in found["extras"] for package in extra["packages"]}
    for name in ("numpy", "torch", "onnxruntime", "matplotlib"):
        assert packages[name]["installed"] == metadata.version(name)
    assert packages["torch"]["needed"] == "2.9"
    assert packages["openvino"]["needed"] == ""


def test_every_extra_for_users_is_listed():
    declared = set(metadata.metadata("klquant").get_all("Provides-Extra"))
    assert set(extras()) == declared - {"all", "dev", "docs"} | {"", "openvino"}


def test_everything_usable_is_a_table_without_commands(installed):
    result = run()
    assert (result.exit_code, result.stderr) == (0, "")
    first, _, *lines = result.stdout.splitlines()
    assert first == f"klquant {klquant.__version__}, Python {sys.version.split()[0]}: {sys.executable}"
    assert "extras" in lines
    assert "pip install" not in result.stdout
    assert "missing" not in result.stdout
    assert "(core)    yes     numpy 999" in result.stdout
    assert "\\n" not in result.stdout
    assert max(map(len, lines)) < 100
    assert {f"{package['name']} 999" for package in extras()["demo"]["packages"]} <= set(
        re.findall(r"[\w-]+ 999", result.stdout)
    )


@pytest.mark.parametrize(
    ("package", "lost"),
    [
        ("jax", {"jax"}),
        ("rich", {"jax", "torch", "pt2e", "onnx", "cli", "demo"}),
        ("torch", {"torch", "pt2e", "demo"}),
        ("onnxscript", {"onnx", "demo"}),
        ("jinja2", {"report", "cli", "demo"}),
        ("matplotlib", {"plots", "demo"}),
        ("pillow", {"images", "demo"}),
        ("openvino", {"openvino"}),
    ],
)
def test_a_missing_package_makes_the_extras_unusable_that_need_it(installed, package, lost):
    installed[package] = None
    assert unusable() == lost
    for name in lost:
        wanted = name if name == "openvino" else f"'klquant[{name}]'"
        assert extras()[name]["install"] == f"pip install -U {wanted}"
    result = run()
    assert result.exit_code == 0
    assert f"{package} missing" in result.stdout
    assert "pip install -U" in result.stdout


@pytest.mark.parametrize(
    ("version", "is_usable"), [("2.8.1+cu118", False), ("2.9.0", True), ("2.10", True), ("3", True), ("1.99", False)]
)
def test_a_package_must_be_new_enough(installed, version, is_usable):
    installed["torch"] = version
    assert extras()["torch"]["usable"] == is_usable
    assert (f"torch {version} (needs 2.9)" in run().stdout) == (not is_usable)


def test_numpy_that_is_too_old_is_exit_code_1(installed):
    installed["numpy"] = "1.25.2"
    result = run()
    assert result.exit_code == 1
    assert "(core)    no      numpy 1.25.2 (needs 1.26)" in result.stdout
    assert "pip install -U klquant\n" in result.stdout.replace(" \n", "\n")
    assert run("--json").exit_code == 1


def test_a_package_of_another_name_is_found_by_its_module(installed, monkeypatch):
    installed["onnxruntime"] = None
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"onnxruntime": ["onnxruntime-gpu"]})
    installed["onnxruntime-gpu"] = "1.31"
    assert extras()["onnx"]["usable"]
    assert "onnxruntime 1.31" in run().stdout


@pytest.mark.parametrize(("flags", "has_hint"), [("avx2 fma", True), ("avx2 avx_vnni", False), ("asimd", False)])
def test_a_cpu_without_vnni_gets_a_hint(monkeypatch, tmp_path, flags, has_hint):
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: fpu {flags}\n")
    monkeypatch.setattr("klquant.cli.commands.doctor.CPU", tmp_path / "cpuinfo")
    assert ("--reduce-range" in run().stdout) == has_hint
    monkeypatch.setattr("klquant.cli.commands.doctor.CPU", tmp_path / "none")
    assert "--reduce-range" not in run().stdout


def test_it_imports_no_library():
    code = (
        "import sys\nfrom klquant.cli import cli\ncli(['doctor'], standalone_mode=False)\n"
        "heavy = {'torch', 'jax', 'onnx', 'onnxruntime', 'openvino', 'matplotlib', 'sklearn'}\n"
        "print(heavy & {name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
