"""Detection of formats in `read_table` and `write_table`."""

import struct
import subprocess
import sys
from typing import get_args

import pytest

from klquant.backends import files
from klquant.backends.formats import FORMATS, FormatName, read_table, write_table
from klquant.errors import InvalidInputError

THRESHOLDS = {"conv1": 2.5, "a:0": 1 / 3, "größe": 255.062}
ROUNDED = {
    "tensorrt": lambda t: struct.unpack("f", struct.pack("f", t / 127))[0] * 127,
    "onnxruntime": lambda t: struct.unpack("f", struct.pack("f", t))[0],
    "ncnn": lambda t: 127 / struct.unpack("f", struct.pack("f", 127 / t))[0],
}


def test_type_checkers_know_every_format():
    assert get_args(FormatName) == tuple(FORMATS)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("form", [str, lambda path: path], ids=["str", "Path"])
def test_each_format_is_recognized_and_read_back(tmp_path, kind, form):
    path = form(tmp_path / f"table{FORMATS[kind].suffix}")
    write_table(path, THRESHOLDS, format=kind)
    expected = {name: ROUNDED.get(kind, float)(value) for name, value in THRESHOLDS.items()}
    assert read_table(path) == read_table(path, format=kind) == expected
    assert expected == pytest.approx(THRESHOLDS, rel=6e-8)


@pytest.mark.parametrize("kind", ["tensorrt", "onnxruntime", "json", "csv"])
def test_the_content_decides_before_the_suffix(tmp_path, kind):
    write_table(tmp_path / "table.table", THRESHOLDS, format=kind)
    assert read_table(tmp_path / "table.table") == read_table(tmp_path / "table.table", format=kind)


def test_an_unambiguous_suffix_decides_how_to_write(tmp_path):
    write_table(tmp_path / "t.CSV", THRESHOLDS)
    assert (tmp_path / "t.CSV").read_text(encoding="utf-8").startswith('"tensor","threshold"')
    write_table(tmp_path / "t.table", {"conv1": 127.0})
    assert (tmp_path / "t.table").read_text() == "conv1 1\n"


@pytest.mark.parametrize(
    ("name", "formats"),
    [
        ("t.json", "onnxruntime, json"),
        ("t.cache", "tensorrt, onnxruntime-text"),
        ("CalibrationTable", ", ".join(FORMATS)),
    ],
)
def test_a_choice_is_left_to_the_caller(tmp_path, name, formats):
    with pytest.raises(
        InvalidInputError, match=f"`format` must be given for `.*{name}`: it could be any of {formats}$"
    ):
        write_table(tmp_path / name, THRESHOLDS)
    assert not list(tmp_path.iterdir())


def test_names_and_numbers_alone_could_be_of_several_formats(tmp_path):
    (tmp_path / "t").write_text("conv1 2.5\n")
    with pytest.raises(
        InvalidInputError, match=r"`format` must be given for `.*`: it could be any of onnxruntime-text, nc"
    ):
        read_table(tmp_path / "t")
    assert read_table(tmp_path / "t", format="onnxruntime-text") == {"conv1": 2.5}
    assert read_table(tmp_path / "t", format="ncnn") == {"conv1": 127 / 2.5}


@pytest.mark.parametrize("call", [read_table, lambda path, **options: write_table(path, THRESHOLDS, **options)])
def test_an_unknown_format_is_an_error_that_lists_the_known(tmp_path, call):
    with pytest.raises(InvalidInputError, match=r"`format` must be one of tensorrt, onnxruntime, .*, got 'trt'"):
        call(tmp_path / "t", format="trt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got an empty file"),
        (b"\xff\xfe{", "line 1: must be UTF-8 text"),
        (b"\x00\x01", "a NUL byte"),
        (b"[1]", "line 1: must be a JSON object"),
        (b'{"klquant": "thresholds"}', "must be a klquant table of thresholds"),
    ],
)
def test_junk_is_an_error_that_names_the_file(tmp_path, content, message):
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(InvalidInputError, match=f"t.json`.*{message}"):
        read_table(tmp_path / "t.json")


def test_no_framework_is_needed():
    code = (
        "import sys, klquant.backends.formats\n"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'jax', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("kind", [None, *FORMATS])
def test_a_file_that_is_too_long_for_a_table_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(files, "MAX_TEXT", 2**20)
    path = tmp_path / "t.csv"
    path.write_bytes(b"x" * (2**20 + 1))
    with pytest.raises(InvalidInputError, match=r"t\.csv` must have at most 1 MiB of text, got more"):
        read_table(path, format=kind)
    with pytest.raises(InvalidInputError, match="at most 1 MiB of text"):
        read_table("/dev/zero", format=kind)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_long_name_is_not_shown_whole(tmp_path, kind):
    with pytest.raises(InvalidInputError) as caught:
        write_table(tmp_path / "t", {"x" * 10**6: -1.0}, format=kind)
    assert len(str(caught.value)) < 500
