import csv
import json
import math

import pytest

from klquant.backends.formats import read_csv, read_json, write_csv, write_json
from klquant.errors import InvalidInputError

THRESHOLDS = {"conv1": 127.0, "a: b, c": 1 / 3, 'größe "1"\r\n': 1e-300, "": 1.7e308, " ": 5e-324}
PAIRS = [(read_csv, write_csv), (read_json, write_json)]


@pytest.mark.parametrize(("read", "write"), PAIRS)
@pytest.mark.parametrize("amax", [None, {"conv1": 200.0, "": 0}])
def test_all_of_it_is_kept(tmp_path, read, write, amax):
    write(tmp_path / "t", THRESHOLDS, amax=amax)
    found = read(tmp_path / "t")
    assert found == THRESHOLDS
    assert list(found) == list(THRESHOLDS)


def test_the_columns_of_the_csv(tmp_path):
    write_csv(tmp_path / "t", {"conv1": 127.0, "b": 254.0}, amax={"b": 300})
    with (tmp_path / "t").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"tensor": "conv1", "threshold": "127.0", "scale": "1.0", "amax": ""},
        {"tensor": "b", "threshold": "254.0", "scale": "2.0", "amax": "300.0"},
    ]


def test_the_keys_of_the_json(tmp_path):
    write_json(tmp_path / "t", {"conv1": 127.0, "b": 254.0}, amax={"b": 300})
    assert json.loads((tmp_path / "t").read_text()) == {
        "klquant": "thresholds",
        "schema": 1,
        "tensors": {"conv1": {"threshold": 127.0, "scale": 1.0}, "b": {"threshold": 254.0, "scale": 2.0, "amax": 300}},
    }


def test_a_csv_that_was_written_by_hand(tmp_path):
    (tmp_path / "t").write_bytes(b"\xef\xbb\xbfnote,threshold,tensor\r\nx,1.5,conv1\r\n\r\n,+2e0,conv2")
    assert read_csv(tmp_path / "t") == {"conv1": 1.5, "conv2": 2.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "line 1: must be a header with `tensor` and `threshold`, got 'a,b'"),
        ("\ntensor,threshold\n", "line 1: must be a header"),
        ("tensor,threshold,tensor\n", "line 1: must be a header"),
        ("tensor,threshold\n", "must have at least one tensor"),
        ("tensor,threshold\na,1\nb\n", "line 3: must be a row of 2 columns, got 'b'"),
        ("tensor,threshold\na,1,5\n", "line 2: must be a row of 2 columns"),
        ("tensor,threshold\na,1\n\na,2\n", "line 4: must be a name that is not already in line 2"),
        ('tensor,threshold\n"a"b,1\n', "line 2: must be CSV"),
        ('tensor,threshold\n"a,1\n', "must be CSV"),
        ("tensor,threshold\na,x\n", "line 2: tensor 'a' must have a positive, finite threshold, got 'x'"),
        ("tensor,threshold\na,0\n", "line 2: tensor 'a' must have a positive, finite threshold, got '0'"),
        ("tensor,threshold\na,-1\n", "line 2: tensor 'a' .* got '-1'"),
        ("tensor,threshold\na,NaN\n", "line 2: tensor 'a' .* got 'NaN'"),
        ("tensor,threshold\na,1e400\n", "line 2: tensor 'a' .* got '1e400'"),
        ("tensor,threshold,scale\na,127,1.001\n", "line 2: tensor 'a' must have scale T / 127 = 1.0, got '1.001'"),
        ("tensor,threshold,scale\na,127,\n", "line 2: tensor 'a' must have scale T / 127 = 1.0, got ''"),
        ("tensor,threshold\n" + 200_000 * "a" + ",1", "must be CSV"),
    ],
)
def test_a_damaged_csv_is_an_error_that_names_the_line(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text, newline="")
    with pytest.raises(InvalidInputError, match=message) as error:
        read_csv(tmp_path / "t.csv")
    assert "t.csv`" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, r"schema 1, got \('thresholds', 2.0\)"),
        ({"klquant": "calibration"}, "must be a klquant table of thresholds"),
        ({"tensors": [1]}, "must be a klquant table of thresholds"),
        ({"tensors": {}}, "must have at least one tensor"),
        ({"tensors": {"a": 1.0}}, "tensor 'a' must have a threshold, got 1.0"),
        ({"tensors": {"a": {"scale": 1.0}}}, "tensor 'a' must have a threshold, got"),
        ({"tensors": {"a": {"threshold": True}}}, "tensor 'a' must have a positive, finite threshold, got True"),
        ({"tensors": {"a": {"threshold": math.nan}}}, "tensor 'a' must have a positive, finite threshold, got nan"),
        ({"tensors": {"a": {"threshold": -1}}}, "tensor 'a' must have a positive, finite threshold, got -1.0"),
        ({"tensors": {"a": {"threshold": 127, "scale": 2}}}, "tensor 'a' must have scale T / 127 = 1.0, got 2.0"),
        ({"tensors": {"a": {"threshold": 127, "scale": None}}}, "tensor 'a' must have scale T / 127 = 1.0, got None"),
    ],
)
def test_a_damaged_json_is_an_error_that_names_the_tensor(tmp_path, change, message):
    document = {"klquant": "thresholds", "schema": 1, "tensors": {"a": {"threshold": 1.0}}}
    (tmp_path / "t.json").write_text(json.dumps(document | change))
    with pytest.raises(InvalidInputError, match=message):
        read_json(tmp_path / "t.json")
    (tmp_path / "t.json").write_text(json.dumps(document))
    assert read_json(tmp_path / "t.json") == {"a": 1.0}


@pytest.mark.parametrize("write", [write_csv, write_json])
def test_what_cannot_be_written_names_the_tensor(tmp_path, write):
    for amax in (-1.0, math.nan, math.inf):
        with pytest.raises(InvalidInputError, match="tensor 'a' must have a finite amax of at least 0, got"):
            write(tmp_path / "t", {"a": 1.0}, amax={"a": amax})
    for name in ("a\0", "\udfff"):
        with pytest.raises(InvalidInputError, match="names that it can write"):
            write(tmp_path / "t", {name: 1.0})
    with pytest.raises(InvalidInputError, match="tensor 'a' must have a positive, finite T, got 0"):
        write(tmp_path / "t", {"a": 0})
    assert not list(tmp_path.iterdir())
