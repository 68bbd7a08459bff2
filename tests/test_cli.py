"""The command `klquant` itself: what its help says, what it imports, how it fails."""

import subprocess
import sys

import click
import numpy as np
import pytest
from click.testing import CliRunner

import klquant
from klquant import __main__
from klquant.cli import cli, group
from klquant.cli.group import COMMANDS


def run(*arguments):
    """Run in this process; what is no error of klquant's own comes through."""
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def command(monkeypatch):
    """Let a function be the command `fake`."""

    def install(function):
        module = type(sys)("klquant.cli.fake")
        module.fake = click.command("fake")(function)
        monkeypatch.setitem(sys.modules, "klquant.cli.fake", module)
        monkeypatch.setitem(COMMANDS, "fake", "Does what a test wants")

    return install


def test_the_help_names_every_command_with_its_own_short_help():
    text = " ".join(run("--help").stdout.split())
    for name, short in COMMANDS.items():
        assert f"{name} {short}" in text
        own = cli.get_command(click.Context(cli), name).get_short_help_str(limit=200)
        assert own.removesuffix(".") == short


def test_the_help_imports_no_command():
    code = (
        "import sys\nfrom klquant.cli import cli\ncli(['--help'], standalone_mode=False)\n"
        "print([m for m in sys.modules if m.partition('.')[0] in ('onnx', 'onnxruntime', 'torch', 'jax', 'rich')])\n"
        "print([m for m in sys.modules if m.startswith(('klquant.cli.', 'klquant.backends'))])"
    )
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[-2:] == ["[]", "['klquant.cli.group']"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_teaches_by_an_example(name):
    text = run(name, "--help").stdout
    assert f"klquant {name}" in text.partition("Example:")[2] or name == "demo"
    assert "\\b" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_exit_codes_are_documented():
    text = run("--help").stdout
    assert all(f"\n    {code} " in text for code in (0, 1, 2, 130))


def test_the_version_is_told():
    assert run("--version").stdout.split()[-1] == klquant.__version__


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (klquant.InvalidInputError("`x` must be\n  one line"), "Error: `x` must be one line"),
        (klquant.MissingDependencyError("pip install it"), "Error: pip install it"),
        (FileNotFoundError(2, "No such file or directory", "a.npz"), "Error: `a.npz`: No such file or directory"),
        (OSError("disk full"), "Error: disk full"),
        (klquant.InvalidInputError("layer `\x1b[2J\u202e`"), "Error: layer `\\x1b[2J\\u202e`"),
        (FileNotFoundError(2, "No such file", "\x1b]0;"), "Error: `\\x1b]0;`: No such file"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(command, error, text):
    def fails():
        raise error

    command(fails)
    result = run("fake")
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", text + "\n")


def test_a_bug_is_not_hidden(command):
    command(lambda: {}["bug"])
    with pytest.raises(KeyError, match="bug"):
        run("fake")


def test_an_interrupt_has_its_own_exit_code(command):
    def interrupted():
        raise KeyboardInterrupt

    command(interrupted)
    assert run("fake").exit_code == 130


def test_a_reader_that_went_away_is_no_error(command):
    def writes():
        raise BrokenPipeError(32, "Broken pipe")

    command(writes)
    assert run("fake").stderr == ""


def test_usage_errors_have_exit_code_2():
    assert run("no-such-command").exit_code == 2
    assert run("threshold").exit_code == 2
    assert run("threshold", "no_such_file.npz").exit_code == 2


def test_warnings_are_one_line_each_on_stderr(command):
    def warns():
        for name in ("a", "b\x07\n"):
            search = np.array([1.0]), klquant.CalibrationWarning(f"layer `{name}`: look at it")
            group.warnings.warn(search[1], stacklevel=1)
        click.echo("done")

    command(warns)
    result = run("fake")
    assert result.stderr == "warning: layer `a`: look at it\nwarning: layer `b\\x07\\n`: look at it\n"
    assert result.stdout == "done\n"


@pytest.mark.parametrize(
    ("arguments", "module"),
    [
        (["inspect", "m.onnx", "--engine", "onnxruntime"], "onnx"),
        (["inspect", "m.onnx", "--engine", "onnxruntime"], "onnxruntime"),
        (["calibrate", "m.onnx", "--data", "d", "--out", "c.npz"], "onnx"),
    ],
)
def test_a_missing_library_is_one_line_with_the_remedy(tmp_path, monkeypatch, arguments, module):
    for name in [name for name in sys.modules if name.startswith("klquant.backends.onnx")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.onnx").touch()
    result = run(*arguments)
    assert result.exit_code == 2
    assert "pip install 'klquant[onnx]'" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("module", ["click", "rich"])
def test_without_the_libraries_of_the_command_line_it_says_what_to_install(module):
    code = f"import sys; sys.modules[{module!r}] = None; sys.argv[1:] = ['threshold', '--help']\n" + (
        "from klquant.__main__ import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert f"needs {module}" in result.stderr
    assert "pip install 'klquant[cli]'" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_broken_installation_is_not_taken_for_a_missing_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "klquant.cli.threshold", None)
    with pytest.raises(ModuleNotFoundError, match=r"klquant\.cli\.threshold"):
        run("threshold", "--help")
    monkeypatch.setitem(sys.modules, "klquant.cli", None)
    with pytest.raises(ModuleNotFoundError, match=r"klquant\.cli"):
        __main__.main()
