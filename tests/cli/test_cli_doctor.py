"""`klquant doctor`: what is there, told also where something is missing, old or broken."""

import json
import sys
from importlib import metadata

import pytest
from click.testing import CliRunner

import klquant
from klquant.cli import cli, environment
from klquant.cli import probe as probing
from klquant.cli.environment import FEATURES, OTHERS
from klquant.cli.probe import Probe
from support.namespaces import needs_jax


def run(*arguments):
    return CliRunner().invoke(cli, ["doctor", *arguments], catch_exceptions=False)


@pytest.fixture
def libraries(monkeypatch):
    """Let all libraries be there, in a version that is new enough, but for those that a test replaces."""
    found = {}
    monkeypatch.setattr(environment, "probe", lambda module: found.get(module, Probe("999")))
    monkeypatch.setattr(
        environment.metadata, "version", lambda name: klquant.__version__ if name == "klquant" else "999"
    )
    return found


def features(result):
    return {feature["what"]: feature for feature in json.loads(result.stdout)["features"]}


@needs_jax  # as one of those that are told
def test_this_machine_is_told_as_it_is(monkeypatch):
    for name in ("plots", "demo"):  # matplotlib and scikit-learn take seconds
        monkeypatch.delitem(FEATURES, name)
    monkeypatch.setattr(environment, "OTHERS", {})
    result = run("--json")
    assert (result.exit_code, result.stderr) == (0, "")
    told = json.loads(result.stdout)
    assert told["versions"]["klquant"] == klquant.__version__
    assert told["executable"] == sys.executable
    packages = {package["name"]: package for package in told["packages"]}
    for name in ("numpy", "torch", "jax", "onnxruntime"):
        assert packages[name]["version"] == metadata.version(name)
        assert packages[name]["problem"] == ""
    assert packages["torch"]["minimum"] == "2.9"
    assert packages["torch"]["devices"][0].startswith("cpu")
    assert packages["jax"]["devices"]
    assert "CPUExecutionProvider" in packages["onnxruntime"]["devices"]
    assert [feature["usable"] for feature in told["features"]] == [True] * len(FEATURES)


def test_everything_usable_is_a_table_without_remedies(libraries):
    libraries["torch"] = Probe("9", "", ["cpu", "cuda:0 (a [big] one)"])
    result = run()
    assert result.exit_code == 0
    assert "pip install" not in result.stdout
    assert "torch    cuda:0 (a [big] one)" in result.stdout
    assert "not installed" not in result.stdout
    for what in (*FEATURES.values(), *OTHERS.values()):
        assert f"{what} " in result.stdout


@pytest.mark.parametrize(
    ("module", "probe", "lost"),
    [
        ("jax", Probe(None), {"jax"}),
        ("rich", Probe(None), {"torch", "onnx", "torch,onnx", "demo", *OTHERS}),
        ("torch", Probe("", "OSError: libcudart.so.12: cannot open"), {"torch", "torch,onnx", "demo"}),
        ("onnxscript", Probe(None), {"onnx", "torch,onnx", *OTHERS}),
        ("jinja2", Probe(None), {"report", "demo"}),
        ("sklearn", Probe(None), {"demo"}),
        ("matplotlib", Probe(None), {"plots", "demo"}),
        ("openvino", Probe(None), {"openvino"}),
        ("PIL", Probe(None), {"pillow"}),
    ],
)
def test_a_library_that_cannot_be_used_is_missed_where_it_is_needed(libraries, module, probe, lost):
    libraries[module] = probe
    result = run("--json")
    assert result.exit_code == 0
    found = features(result)
    unusable = {what for what, feature in found.items() if not feature["usable"]}
    assert unusable == {{**FEATURES, **OTHERS}[name] for name in lost}
    for name in lost:
        package = f"'klquant[onnx]' {name}" if name in OTHERS else f"'klquant[{name}]'"
        assert found[{**FEATURES, **OTHERS}[name]]["install"] == f"pip install -U {package}"
    table = run().stdout
    assert (probe.error or "not installed") in table
    assert "pip install -U" in table


def test_without_numpy_nothing_is_usable(libraries):
    libraries["numpy"] = Probe("", "ImportError: numpy.core is broken")
    result = run("--json")
    assert result.exit_code == 1
    assert not any(feature["usable"] for feature in features(result).values())


def test_an_old_version_is_told_with_the_one_that_is_needed(libraries, monkeypatch):
    versions = {"torch": "2.8.1+cu118", "onnx": "1.23.0"}
    monkeypatch.setattr(environment.metadata, "version", lambda name: versions.get(name, "999"))
    result = run("--json")
    packages = {package["name"]: package for package in json.loads(result.stdout)["packages"]}
    assert packages["torch"]["problem"] == "too old, 2.9 is needed"
    assert packages["onnx"]["problem"] == ""
    found = features(result)
    assert not found[FEATURES["torch"]]["usable"]
    assert found[FEATURES["torch"]]["missing"] == ["torch>=2.9"]
    assert found[FEATURES["onnx"]]["usable"]


def test_a_library_of_another_name_is_found_by_its_module(libraries, monkeypatch):
    libraries |= {"onnxruntime": Probe("1.30.0"), "jinja2": Probe("")}

    def version(name):
        if name in ("onnxruntime", "jinja2"):  # as with onnxruntime-gpu
            raise metadata.PackageNotFoundError(name)
        return "999"

    monkeypatch.setattr(environment.metadata, "version", version)
    result = run("--json")
    packages = {package["name"]: package for package in json.loads(result.stdout)["packages"]}
    assert packages["onnxruntime"]["version"] == "1.30.0"
    assert features(result)[FEATURES["onnx"]]["usable"]
    assert features(result)[FEATURES["report"]]["usable"]  # a version that is not known is not old


def test_every_extra_is_the_need_of_a_feature():
    extras = set(metadata.metadata("klquant").get_all("Provides-Extra"))
    named = {extra for name in FEATURES for extra in name.split(",") if extra}
    assert extras - {"all", "dev", "docs", "cli", "images"} == named  # cli: this command


# --- a library asked in a process of its own ---


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Let a text be the module `fake_library`."""
    monkeypatch.syspath_prepend(tmp_path)
    return (tmp_path / "fake_library.py").write_text


def test_a_library_tells_its_version_and_whatever_it_prints_is_ignored(module):
    module("import sys\nprint('hello')\nprint('hello', file=sys.stderr)\n__version__ = '1.5'")
    assert probing.probe("fake_library") == Probe("1.5", "", [])
    assert "fake_library" not in sys.modules


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("raise OSError('libcudart.so:\\n  cannot open')", "OSError: libcudart.so: cannot open"),
        ("import os; os.abort()", "importing it ended Python with exit code -6"),
        ("import time; time.sleep(60)", "importing it took more than 1 s"),
        ("exit()", "importing it ended Python with exit code 0"),
    ],
)
def test_a_library_that_breaks_is_told_and_stops_nothing(module, monkeypatch, text, error):
    monkeypatch.setattr(probing, "TIMEOUT", 1)
    module(text)
    assert probing.probe("fake_library")[:2] == ("", error)


def test_a_library_that_is_not_there_is_not_looked_for_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fake_library.py").touch()
    assert probing.probe("fake_library") == Probe(None)


def test_nobody_reports_or_takes_the_memory_of_a_gpu(module):
    module("import os\n__version__ = os.environ['CI'] + os.environ['XLA_PYTHON_CLIENT_PREALLOCATE']")
    assert probing.probe("fake_library").version == "truefalse"
