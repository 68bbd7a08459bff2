"""The command `klquant` itself: help, imports, errors."""

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner

import klquant
from klquant import __main__
from klquant.backends.calibration import Calibration
from klquant.backends.settings import Settings
from klquant.cli import cli, group
from klquant.cli.group import COMMANDS


def run(*arguments):
    """Run a command in this process. Unexpected exceptions are raised."""
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def command(monkeypatch):
    """Install a function as the command `fake`."""

    def install(function):
        module = type(sys)("klquant.cli.commands.fake")
        module.fake = click.command("fake")(function)
        monkeypatch.setitem(sys.modules, "klquant.cli.commands.fake", module)
        monkeypatch.setitem(cli.commands, "fake", click.Command("fake"))

    return install


def test_the_help_names_every_command_with_its_own_short_help():
    text = " ".join(run("--help").stdout.split())
    for name, short in COMMANDS.items():
        assert f"{name} {short}" in text
        own = cli.resolve_command(click.Context(cli), [name])[1].get_short_help_str(limit=200)
        assert own.removesuffix(".") == short


def test_the_help_imports_no_command():
    code = (
        "import sys\nfrom klquant.cli import cli\ncli(['--help'], standalone_mode=False)\n"
        "heavy = ('onnx', 'onnxruntime', 'torch', 'jax', 'rich', 'matplotlib', 'jinja2')\n"
        "print([m for m in sys.modules if m.partition('.')[0] in heavy])\n"
        "print([m for m in sys.modules if m.startswith(('klquant.cli.', 'klquant.backends'))])"
    )
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[-2:] == ["[]", "['klquant.cli.errors', 'klquant.cli.group']"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_an_example(name):
    text = run(name, "--help").stdout
    assert f"klquant {name}" in text.partition("Example:")[2]
    assert "\\b" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_exit_codes_are_documented():
    text = run("--help").stdout
    assert all(f"\n    {code} " in text for code in (0, 1, 2, 3, 130))


def test_the_version_is_printed():
    assert run("--version").stdout.split()[-1] == klquant.__version__


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (klquant.InvalidInputError("`x` must be\n  one line"), "Error: `x` must be one line"),
        (FileNotFoundError(2, "No such file or directory", "a.npz"), "Error: `a.npz`: No such file or directory"),
        (OSError("disk full"), "Error: disk full"),
        (klquant.InvalidInputError("layer `\x1b[2J\u202e`"), "Error: layer `\\x1b[2J\\u202e`"),
        (FileNotFoundError(2, "No such file", "\x1b]0;"), "Error: `\\x1b]0;`: No such file"),
        (klquant.ModelError("batch 3: no"), "Error: batch 3: no\nHint: --debug shows the traceback"),
        (MemoryError(), "Error: out of memory\nHint: try smaller batches"),
        (
            klquant.MissingDependencyError("pip install it"),
            "Error: pip install it\nHint: `klquant doctor` shows what is installed",
        ),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(command, error, text):
    def fails():
        raise error

    command(fails)
    result = run("fake")
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", text + "\n")


def test_an_unexpected_error_is_reported_as_a_bug(command):
    command(lambda: {}["key"])
    result = run("fake")
    assert (result.exit_code, result.stdout) == (3, "")
    first, second = result.stderr.splitlines()
    assert first == "Error: bug in klquant: KeyError: 'key'"
    assert "please report" in second


@pytest.mark.parametrize("arguments", [["--debug", "fake"], ["fake", "--debug"]])
@pytest.mark.parametrize(("error", "code"), [(klquant.InvalidInputError("no"), 2), (ValueError("no"), 3)])
def test_debug_shows_where_an_error_comes_from(command, arguments, error, code):
    def fails():
        raise error

    command(fails)
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("Traceback (most recent call last):\n")
    assert __file__ in result.stderr
    assert "\nError: " in result.stderr
    assert "Traceback" not in run("fake").stderr


def test_an_interrupt_has_its_own_exit_code(command):
    def interrupted():
        raise KeyboardInterrupt

    command(interrupted)
    result = run("fake")
    assert (result.exit_code, result.output) == (130, "")


@pytest.mark.parametrize("module", ["good", "bad"])
def test_an_interrupt_waits_until_a_module_is_loaded(tmp_path, monkeypatch, command, module):
    text = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nopen('loaded', 'w').close()\n"
    (tmp_path / "good.py").write_text(text)
    (tmp_path / "bad.py").write_text(f"{text}raise ImportError('initialization failed')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    command(lambda: group.needed(module, "cli"))
    before = signal.getsignal(signal.SIGINT)
    result = run("fake")
    assert (result.exit_code, result.output) == (130, "")
    assert (tmp_path / "loaded").exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_commands_run_in_any_thread(command):
    command(lambda: click.echo(group.needed("json", "cli").__name__))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, "fake").result().output == "json\n"


def test_a_closed_pipe_is_not_an_error(command):
    def writes():
        raise BrokenPipeError(32, "Broken pipe")

    command(writes)
    assert run("fake").stderr == ""


def test_debug_works_in_any_position(command):
    def fails(ctx, param, value):
        raise ValueError(value)

    command(click.option("-x", callback=fails)(lambda x: None))
    assert run("fake", "-x", "1", "--debug").stderr.startswith("Traceback")


@pytest.mark.parametrize(
    ("arguments", "error", "helping"),
    [
        (["no-such-command"], "No such command 'no-such-command'", ""),
        (["quantise", "model.onnx"], "No such command 'quantise'. Did you mean 'quantize'?", ""),
        (["calbrate"], "No such command 'calbrate'. Did you mean 'calibrate'?", ""),
        (["--no-such-option"], "No such option", ""),
        (["threshold"], "Missing argument 'HIST'", " threshold"),
        (["threshold", "a.npz"], "'a.npz' does not exist", " threshold"),
        (
            ["inspect", "a.onnx", "--engine", "x"],
            "expected one of tensorrt, onnxruntime, openvino, got 'x'",
            " inspect",
        ),
    ],
)
def test_usage_errors_are_one_line_and_a_hint_with_exit_code_2(tmp_path, monkeypatch, arguments, error, helping):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.onnx").touch()
    result = CliRunner().invoke(cli, arguments, prog_name="klquant")
    assert (result.exit_code, result.stdout) == (2, "")
    first, second = result.stderr.splitlines()
    assert first.startswith("Error: ")
    assert error in first
    assert second == f"Hint: see `klquant{helping} --help`"


def test_without_arguments_it_shows_its_help():
    result = run()
    assert "Commands:" in result.output
    assert "Error" not in result.output


@pytest.mark.parametrize(
    ("arguments", "expected", "found"),
    [
        (["quantize", "calib.npz", "a.onnx", "-o", "b"], "an ONNX model", "a klquant calibration"),
        (["quantize", "a.onnx", "hist.npz", "-o", "b"], "a klquant calibration", "a NumPy file"),
        (["calibrate", "net.pt", "--data", "d", "-o", "b"], "an ONNX model", "a PyTorch file"),
        (["inspect", "old.cache", "--engine", "tensorrt"], "an ONNX model", "a TensorRT calibration cache"),
        (["threshold", "a.onnx"], "a NumPy file or a klquant calibration", "an ONNX model"),
        (["report", "hist.npy"], "a klquant calibration", "a NumPy file"),
        (["convert", "a.onnx", "b"], "a TensorRT calibration cache or a klquant calibration", "an ONNX model"),
    ],
)
def test_a_file_of_the_wrong_kind_is_refused_at_once(tmp_path, monkeypatch, arguments, expected, found):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.onnx").write_bytes(b"\x08\x08")
    (tmp_path / "old.cache").write_text("TRT-8601-EntropyCalibration2\nx: 3c010a14\n")
    np.save(tmp_path / "hist.npy", np.ones(3))
    np.savez(tmp_path / "hist.npz", hist=np.ones(3))
    Calibration.of(Settings.make()).save(tmp_path / "calib.npz")
    torch.save({"weight": torch.ones(3)}, tmp_path / "net.pt")
    result = run(*arguments)
    assert result.exit_code == 2
    assert f"expected {expected}, got `" in result.stderr.splitlines()[0]
    assert result.stderr.splitlines()[0].endswith(f": {found}")
    assert not (tmp_path / "b").exists()


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
    first, second = result.stderr.splitlines()
    assert "pip install 'klquant[onnx]'" in first
    assert "klquant doctor" in second


@pytest.mark.parametrize("module", ["click", "rich"])
def test_without_click_or_rich_it_names_the_extra(module):
    code = f"import sys; sys.modules[{module!r}] = None; sys.argv[1:] = ['threshold', '--help']\n" + (
        "from klquant.__main__ import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert f"needs {module}" in result.stderr
    assert "pip install 'klquant[cli]'" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_broken_installation_is_not_taken_for_a_missing_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "klquant.cli.commands.threshold", None)
    result = run("threshold", "--help")
    assert (result.exit_code, "bug in klquant: ModuleNotFoundError" in result.stderr) == (3, True)
    monkeypatch.setitem(sys.modules, "klquant.cli", None)
    with pytest.raises(ModuleNotFoundError, match=r"klquant\.cli"):
        __main__.main()


def test_short_options_for_help_and_version():
    assert run("-h").stdout == run("--help").stdout
    assert run("-V").stdout == run("--version").stdout
    assert run("auto", "-h").stdout == run("auto", "--help").stdout


@pytest.mark.parametrize(
    ("option", "value", "hint"),
    [("--criterion", "kl", "did you mean 'entropy'?"), ("--override", "a=minmax", "did you mean 'max'?"),
     ("--override", "a=-1", "PATTERN=T with a threshold, got 'a=-1'")],
)  # fmt: skip
def test_the_names_of_other_tools_are_understood(tmp_path, option, value, hint):
    np.savez(tmp_path / "calib.npz", meta=np.zeros(1))
    (tmp_path / "a.onnx").touch()
    result = run("quantize", tmp_path / "a.onnx", tmp_path / "calib.npz", "-o", tmp_path / "b.onnx", option, value)
    assert result.exit_code == 2
    assert hint in result.stderr


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("`num_bins` must be odd, got 4", "`--num-bins` must be odd, got 4"),
        ("`correct_bias` needs `batches`", "`--correct-bias` needs `--data`"),
        ("tensor `num_bins` must be finite", "tensor `num_bins` must be finite"),
        ("`other` must be odd", "`other` must be odd"),
    ],
)
def test_messages_name_the_options_of_the_command(command, message, shown):
    @click.option("--num-bins", type=int)
    @click.option("--correct-bias", is_flag=True)
    def fails(num_bins, correct_bias):
        raise klquant.InvalidInputError(message)

    command(fails)
    assert run("fake").stderr == f"Error: {shown}\n"


def test_on_a_terminal_warnings_are_wrapped_between_words_and_coloured(monkeypatch, capsys):
    from klquant.cli import output

    monkeypatch.setattr(output.sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    output.say("warning: " + "a-rather-long-name " * 6, colour="yellow")
    lines = click.unstyle(capsys.readouterr().err).splitlines()
    assert all(len(line) <= 40 for line in lines)
    assert " ".join(lines).split() == ["warning:"] + ["a-rather-long-name"] * 6
    monkeypatch.setattr(output.sys.stderr, "isatty", lambda: False)
    output.say("warning: " + "a-rather-long-name " * 6, colour="yellow")
    assert len(capsys.readouterr().err.splitlines()) == 1
