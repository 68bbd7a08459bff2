"""Completion of commands, options and values in a shell."""

import os
import shutil
import subprocess
import sys

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from klquant.backends.calibration import Calibration
from klquant.backends.formats import FORMATS
from klquant.backends.settings import Settings
from klquant.cli import cli
from klquant.cli.group import COMMANDS

bash = shutil.which("bash")


def completed(*arguments):
    *before, incomplete = map(str, arguments)
    items = ShellComplete(cli, {}, "klquant", "_KLQUANT_COMPLETE").get_completions(before, incomplete)
    return [item.value if item.type == "plain" else item.type for item in items]


def test_commands_complete():
    assert completed("thr") == ["threshold"]
    assert completed("ca") == ["calibrate", "cache-to-qdq"]
    assert completed("--debug", "dem") == ["demo"]
    assert completed("") == list(COMMANDS)


def test_completing_a_command_imports_none():
    code = (
        "import sys\nfrom klquant.cli import cli\nfrom click.shell_completion import ShellComplete\n"
        "print(len(ShellComplete(cli, {}, 'klquant', '').get_completions([], '')))\n"
        "print([m for m in sys.modules if m.startswith(('klquant.cli.', 'klquant.backends', 'rich', 'onnx'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(len(COMMANDS)), "['klquant.cli.errors', 'klquant.cli.group']"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["convert", "a", "b", "--to", ""], list(FORMATS)),
        (["convert", "a", "b", "--from", "cal"], ["calibration"]),
        (["calibrate", "a", "--criterion", ""], ["entropy", "max", "percentile", "mse", "auto"]),
        (["inspect", "a", "--engine", "on"], ["onnxruntime"]),
        (["quantize", "a", "b", "--engine", ""], ["tensorrt", "onnxruntime", "openvino"]),
        (["quantize", "a", "b", "--red"], ["--reduce-range"]),
        (["inspect", ""], ["file"]),
        (["calibrate", "a", "--data", ""], ["file"]),
        (["threshold", "no_such_file.npz", "--tensor", ""], []),
        (["threshold", "--tensor", ""], []),
    ],
)
def test_choices_and_files_complete(arguments, expected):
    assert completed(*arguments) == expected


def test_tensors_of_a_calibration_complete(tmp_path):
    names = ["conv1_output", "conv2_output", "logits"]
    Calibration.of(Settings.make())._replace(amax=dict.fromkeys(names, 0.0)).save(tmp_path / "calib.npz")
    assert completed("threshold", tmp_path / "calib.npz", "--tensor", "conv") == names[:2]
    assert completed("threshold", tmp_path / "calib.npz", "--tensor=logi") == ["logits"]
    (tmp_path / "other.npz").write_text("something else")
    assert completed("threshold", tmp_path / "other.npz", "--tensor", "") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell_calls_the_command(shell):
    result = CliRunner().invoke(cli, ["completion", shell], prog_name="klquant")
    assert result.exit_code == 0
    assert "_KLQUANT_COMPLETE=" in result.stdout
    assert f"{shell}_complete" in result.stdout


@pytest.mark.skipif(bash is None, reason="needs bash")
def test_bash_completes_with_the_script(tmp_path):
    command = tmp_path / "klquant"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m klquant "$@"\n')
    command.chmod(0o755)
    script = (
        "source <(klquant completion bash) && COMP_WORDS=(klquant thr) COMP_CWORD=1 && _klquant_completion klquant thr"
        ' && echo "${COMPREPLY[@]}"'
    )
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([bash, "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert (done.stdout, done.stderr) == ("threshold\n", "")
