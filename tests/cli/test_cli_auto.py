"""``klquant auto``: one command from a float model and a folder of pictures to a verified INT8 model."""

import json
import shlex

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from klquant.backends.onnx import compare
from klquant.cli import cli
from support.onnx_models import build

RNG = np.random.default_rng(0)
MODEL = build("float[n, 3, 8, 8] x", "float[n, 4] y",
              "a = Conv <pads = [1, 1, 1, 1]> (x, w1) r = Relu (a) c = Conv (r, w2) p = GlobalAveragePool (c) "
              "y = Flatten (p)", w1=(4, 3, 3, 3), w2=(4, 4, 3, 3))  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")
    monkeypatch.chdir(tmp_path)
    onnx.save(MODEL, "model.onnx")
    (tmp_path / "photos").mkdir()
    for k in range(24):
        pixels = RNG.integers(0, 256, size=(10, 12, 3), dtype=np.uint8)
        image.fromarray(pixels).save(f"photos/{k}.{('png', 'bmp', 'webp')[k % 3]}")
    (tmp_path / "photos" / "labels.txt").touch()
    return tmp_path


def run(*arguments):
    common = ("auto", "model.onnx", "--data", "photos", "--engine", "onnxruntime", "-o", "int8.onnx")
    return CliRunner().invoke(cli, [*common, *map(str, arguments)], catch_exceptions=False)


def test_it_writes_model_and_report_and_says_what_they_are_worth(here):
    result = run("--target", "10dB")
    assert result.exit_code == 0, result.output
    assert "24 pictures (1 other files ignored: .txt), rgb / 255, no mean / std, stretched to 8x8: inputs 0 .. 1" in (
        result.stderr
    )
    lines = result.stdout.splitlines()
    assert sum(line.startswith("* ") for line in lines) == 1
    assert any(line.startswith("Accurate enough: with ") for line in lines)
    assert any(line.startswith("Verified: onnxruntime: ") for line in lines)
    assert lines[-1] == "wrote int8.onnx and int8.html"
    (command,) = (line for line in lines if line.startswith("  klquant compare"))
    np.save("LABELS.npy", np.zeros(24, np.int64))
    assert CliRunner().invoke(cli, shlex.split(command, comments=True)[1:], catch_exceptions=False).exit_code == 0
    verdict = next(line for line in lines if line.startswith("Accurate"))
    assert verdict.partition(":")[0] in (here / "int8.html").read_text()
    assert compare("model.onnx", "int8.onnx", [RNG.random((8, 3, 8, 8), np.float32)], engine="onnxruntime").sqnr_db > 10


def test_out_of_reach_the_next_step_is_tune_with_the_same_options(here):
    result = run("--target", "90dB", "--max-seconds", "1", "--report=a.html", "--mean", "0.5")
    assert result.exit_code == 1
    (command,) = (line for line in result.stdout.splitlines() if line.startswith("  klquant tune"))
    arguments = shlex.split(command, comments=True)
    expected = "klquant tune model.onnx --data photos --engine onnxruntime -o int8.onnx --target 90dB --mean 0.5"
    assert arguments == expected.split()
    again = CliRunner().invoke(cli, [*arguments[1:], "--max-runs", "1"], catch_exceptions=False)
    assert again.exit_code == 1
    assert (here / "a.html").exists()


def test_the_next_command_reads_pictures_in_the_same_way(here):
    def next_of(arguments):
        result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
        return shlex.split(result.stdout.splitlines()[-1])[1:]

    given = ["--image-size=8x8", "--fit", "crop", "--mean", "0.5", "--std=0.25", "--pixel-range", "1", "--channels"]
    given += ["BGR", "--layout", "NCHW"]
    arguments = ["smooth", "model.onnx", "--data", "photos", "-o", "smooth.onnx", *given]
    for name in ("calibrate", "quantize", "compare"):
        command = next_of(arguments)
        assert command[:2] == ["klquant", name]
        k = command.index(given[0])
        assert command[k : k + len(given)] == given
        arguments = [word.replace("ENGINE", "onnxruntime") for word in command[1:]]


def test_json_is_the_only_thing_on_stdout(here):
    found = json.loads(
        run("--json", "--override", "x=max", "--max-seconds", "1", "--max-samples", "9", "--target", "10dB").stdout
    )
    assert found["reached"]
    assert found["data"] == {"calibrated": 7, "measured": 2, "held_out": True}
    assert found["best"]


def test_one_sample_at_a_time_where_the_model_wants_it(here):
    fixed = build("float[5, 3, 8, 8] x", "float[5, 4, 8, 8] y", "y = Conv <pads = [1, 1, 1, 1]> (x, w)", w=(4, 3, 3, 3))
    onnx.save(fixed, "model.onnx")
    result = run("--target", "10dB", "--max-seconds", "1")
    assert result.exit_code == 0
    assert "20 of 24 pictures" in result.stderr  # four batches of five
