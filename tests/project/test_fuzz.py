"""A short run of the fuzzers (tests/tools/fuzz/run.py): any bytes load or raise a named error."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from klquant.errors import InvalidInputError
from tools.fuzz import run
from tools.fuzz.loop import Attempts, damaged
from tools.fuzz.targets import Target, targets

RUN = Path(__file__).parents[1] / "tools" / "fuzz" / "run.py"
TARGETS = targets()
NUMBER = {"report": 20, "threshold": 60, "onnx": 60, "inspect tensorrt": 80, "inspect onnxruntime": 40}


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_read_or_refused_by_a_named_error(tmp_path, name):
    target = TARGETS[name]
    attempts, inputs = Attempts(name, target, tmp_path, tmp_path / "failed"), damaged(name, target, tmp_path, "short")
    for _ in range(NUMBER.get(name, 150)):
        attempts.attempt(next(inputs))
    account = attempts.account()
    assert account.failures == {}
    assert account.accepted > 0
    assert account.errors > 0 or name == "terminal"


def test_what_is_no_named_error_is_counted_and_kept(tmp_path):
    def fails(folder, data):
        raise {b"a": InvalidInputError, b"b": KeyError, b"c": MemoryError}[data]

    attempts = Attempts("x y", Target(fails, None), tmp_path, tmp_path / "failed")
    for data in (b"a", b"b", b"b", b"c"):
        attempts.attempt(data)
    account = attempts.account()
    assert (account.inputs, account.errors, account.accepted) == (4, 1, 0)
    assert sorted(account.failures.values()) == [1, 2]
    assert (tmp_path / "failed" / "x-y-1").read_bytes() == b"b"
    assert "KeyError" in (tmp_path / "failed" / "x-y-1.txt").read_text()


def test_inputs_are_the_same_for_the_same_seed(tmp_path):
    def first(seed):
        inputs = damaged("npz", TARGETS["npz"], tmp_path, seed)
        return [next(inputs) for _ in range(60)]

    assert first("a") == first("a") != first("b")


def test_the_command_prints_a_row_for_each_target(tmp_path):
    command = [sys.executable, RUN, "--target", "tensorrt-cache", "--inputs", "200", "--failed", tmp_path / "failed"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    head, row = done.stdout.splitlines()
    assert head.split()[0] == "target"
    assert row.split()[:2] == ["tensorrt-cache", "200"]
    assert row.endswith("ok")
    assert not (tmp_path / "failed").exists()


def test_after_a_crash_the_rest_is_tried(monkeypatch, capsys):
    account = {"seconds": 1.0, "errors": 30, "accepted": 70, "worst": 0.5, "peak": 7, "failures": {}}
    found = [({**account, "inputs": 100}, "ended with -11: "), ({**account, "inputs": 200, "worst": 0.2}, "")]
    asked = []
    monkeypatch.setattr(run, "_in_child", lambda name, options, more: asked.append(more) or found.pop(0))
    assert run._parent("onnx", SimpleNamespace(inputs=300, seconds=60.0, seed="0")) == 1
    assert [(more[1], more[-1]) for more in asked] == [("300", "0"), ("200", "0.x")]
    row = capsys.readouterr().out.split()
    assert row[:5] == ["onnx", "300", "2", "60", "140"]
    assert row[5:] == ["0.50", "7", "1", "x", "ended", "with", "-11:"]
