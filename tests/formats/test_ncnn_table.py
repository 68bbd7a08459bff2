import math

import numpy as np
import pytest

from klquant.backends.formats import NcnnTable, read_ncnn_table, write_ncnn_table
from klquant.errors import CalibrationWarning, InvalidInputError

WRITTEN_BY_NCNN = "conv1_param_0 156.639840 inf \nfc_param_0 12.500000 \nconv1 63.500000 \nfc 0.498039 \n"


def save(path, text):
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_table_of_ncnn2table_is_read(tmp_path, end):
    path = save(tmp_path / "t.table", WRITTEN_BY_NCNN.replace("\n", end) + end)
    found = NcnnTable.load(path)
    assert found.weights == {"conv1_param_0": (float(np.float32(156.63984)), math.inf), "fc_param_0": (12.5,)}
    assert found.activations == {"conv1": 63.5, "fc": float(np.float32(0.498039))}
    assert read_ncnn_table(path) == {"conv1": 2.0, "fc": pytest.approx(255.0001, rel=1e-6)}


def test_thresholds_are_written_as_their_inverse_behind_the_weights_of_another_table(tmp_path):
    weights = NcnnTable.load(save(tmp_path / "t", WRITTEN_BY_NCNN)).weights
    write_ncnn_table(tmp_path / "t", {"conv1": 254.0, "größe/1:0": 127 / 0.1}, weights=weights)
    expected = "conv1_param_0 156.639847 inf\nfc_param_0 12.5\nconv1 0.5\ngröße/1:0 0.100000001\n"
    assert (tmp_path / "t").read_text(encoding="utf-8") == expected
    assert NcnnTable.load(tmp_path / "t").weights == weights


def test_scales_are_kept_bit_for_bit(tmp_path):
    bits = np.random.default_rng(0).integers(1, 0x7F800000, 1000, dtype=np.uint32)
    scales = np.append(bits.view(np.float32), np.finfo(np.float32).smallest_subnormal).astype(np.float64).tolist()
    table = NcnnTable({"a_param_0": tuple(scales)}, {str(k): scale for k, scale in enumerate(scales)})
    table.save(tmp_path / "t")
    assert NcnnTable.load(tmp_path / "t") == table
    write_ncnn_table(tmp_path / "t", read_ncnn_table(tmp_path / "t"), weights=table.weights)
    assert NcnnTable.load(tmp_path / "t") == table


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a 1.0\nb\n", "line 2: must be `layer scale` or `layer_param_0 scale ...`, got 'b'"),
        ("a 1.0\n\nb 1.0\n", "line 2: must be names that are not empty"),
        ("a\tb 1.0\n", "line 1: must be names that are not empty and have no spaces"),
        ("a 1.0 2.0\n", "line 1: must be `layer scale` or"),
        ("a 1.0\na_param_0 1 2\na 2.0\n", "line 3: must be a name that is not already in line 1, got 'a'"),
        ("a infinite\n", "line 1: must be numbers as scales for 'a', got 'infinite'"),
        ("a 1_0\n", "numbers as scales for 'a', got '1_0'"),
        ("a 1e39\n", "t`, line 1: tensor 'a' must have a value that float32 can hold"),
        ("a_param_0 1\n", "must have at least one tensor"),
        ("x" * 256 + " 1\n", "names of up to 255 bytes"),
    ],
)
def test_a_damaged_table_is_an_error_that_names_the_line(tmp_path, text, message):
    with pytest.raises(InvalidInputError, match=message):
        read_ncnn_table(save(tmp_path / "t", text))


@pytest.mark.parametrize("name", ["", "a b", "a\tb", "a\n", "a\0", "a_param_0", "é" * 128])
def test_a_name_that_ncnn_would_read_otherwise_is_an_error(tmp_path, name):
    with pytest.raises(InvalidInputError, match=r"must have .*names"):
        write_ncnn_table(tmp_path / "t", {"a": 1.0, name: 1.0})
    with pytest.raises(InvalidInputError, match=r"must have .*names"):
        NcnnTable({}, {name: 1.0}).save(tmp_path / "t")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("weights", [{"a": [1.0]}, {"a_param_0": []}, {"a_param_0": [0.0]}, {"a_param_0": [math.nan]}])
def test_weights_are_checked(tmp_path, weights):
    with pytest.raises(InvalidInputError, match=r"'a(_param_0)?'"):
        write_ncnn_table(tmp_path / "t", {"a": 1.0}, weights=weights)


def test_an_activation_has_no_infinite_scale(tmp_path):
    with pytest.raises(InvalidInputError, match="tensor 'a' must have a value that float32 can hold, got inf"):
        NcnnTable({}, {"a": math.inf}).save(tmp_path / "t")


@pytest.mark.parametrize("scale", ["inf", "-nan", "0.000000", "-1", "1.#INF00", "-1.#IND00", "-nan(ind)"])
def test_a_layer_without_a_usable_scale_is_left_out_and_named(tmp_path, scale):
    """ncnn2table writes inf for a layer whose input was always 0."""
    (tmp_path / "t").write_text(f"a_param_0 1.0 inf\na {scale}\nb 2.0\n")
    with pytest.warns(CalibrationWarning, match="1 tensors of .*t` have no usable scale and are left out: `a`"):
        assert read_ncnn_table(tmp_path / "t") == {"b": 63.5}
    assert NcnnTable.load(tmp_path / "t").weights == {"a_param_0": (1.0, math.inf)}
