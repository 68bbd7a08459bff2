import json

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static
from onnxruntime.quantization.calibrate import TensorData, TensorsData, load_tensors_data, save_tensors_data
from onnxruntime.quantization.quant_utils import write_calibration_table

from klquant.backends.formats import (
    read_onnxruntime_table,
    read_onnxruntime_text,
    write_onnxruntime_table,
    write_onnxruntime_text,
)
from klquant.errors import CalibrationWarning, InvalidInputError

ENDS = {"conv/out:0": (-2.5, 1.0), "a b": (0.0, 0.1), "größe": (-7.25, -1.0), "one": ([-3.0], [4.0])}
LARGEST = {"conv/out:0": 2.5, "a b": float(np.float32(0.1)), "größe": 7.25, "one": 4.0}
THRESHOLDS = {"x": 1.7, "a: b": 1e-30, 'größe "1"\n': 3e38}


def tensors(method=CalibrationMethod.MinMax, **more):
    data = {name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in ENDS.items()}
    arrays = {name: np.array(more[name], np.float32) for name in more}
    return TensorsData(
        method, data | {name: TensorData(lowest=-value, highest=value) for name, value in arrays.items()}
    )


def save(path, document):
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return path


@pytest.mark.parametrize("method", [CalibrationMethod.MinMax, CalibrationMethod.Entropy])
def test_what_quantize_static_keeps_is_read(tmp_path, method):
    save_tensors_data(tensors(method), tmp_path / "t.json")
    assert read_onnxruntime_table(tmp_path / "t.json") == LARGEST


def test_what_an_entropy_calibration_keeps_is_read(tmp_path):
    hist, edges = np.arange(3), np.arange(4).astype(np.float32)
    data = {"x": (np.array(-2.0, np.float32), np.array(1.5, np.float32), hist, edges)}
    save_tensors_data(TensorsData(CalibrationMethod.Entropy, data), tmp_path / "t.json")
    assert read_onnxruntime_table(tmp_path / "t.json") == {"x": 2.0}


@pytest.mark.parametrize("table", [tensors(), tensors().data], ids=["TensorsData", "dict"])
def test_what_write_calibration_table_writes_is_read(tmp_path, table):
    for value in tensors().data.values():
        assert {"lowest", "highest"} <= set(value.to_dict())
    write_calibration_table(table, str(tmp_path))
    assert read_onnxruntime_table(tmp_path / "calibration.json") == LARGEST


def test_the_text_of_write_calibration_table_is_read(tmp_path):
    write_calibration_table(TensorsData(CalibrationMethod.MinMax, {"a b": tensors()["a b"]}), str(tmp_path))
    found = read_onnxruntime_text(tmp_path / "calibration.cache")
    assert found == {"a b": pytest.approx(0.1, rel=1e-7)}


def test_the_text_of_write_calibration_table_lacks_the_lower_end(tmp_path):
    """Why its reader's docstring warns; if onnxruntime changes this, the warning can go."""
    write_calibration_table(TensorsData(CalibrationMethod.MinMax, {"x": tensors()["conv/out:0"]}), str(tmp_path))
    assert read_onnxruntime_text(tmp_path / "calibration.cache") == {"x": 1.0}
    assert read_onnxruntime_table(tmp_path / "calibration.json") == {"x": 2.5}


def test_the_table_of_older_versions_is_read(tmp_path):
    assert read_onnxruntime_table(save(tmp_path / "t.json", {"x": [-1, 0.5], "y": [0.0, 2]})) == {"x": 1.0, "y": 2.0}


def test_onnxruntime_reads_what_is_written(tmp_path):
    write_onnxruntime_table(tmp_path / "t.json", THRESHOLDS)
    found = load_tensors_data(tmp_path / "t.json")
    assert found.calibration_method is CalibrationMethod.Entropy
    assert list(found.keys()) == list(THRESHOLDS)
    for name, value in THRESHOLDS.items():
        assert found[name].range_value == (-np.float32(value), np.float32(value))
        assert found[name].highest.dtype == np.float32
    assert read_onnxruntime_table(tmp_path / "t.json") == {k: float(np.float32(v)) for k, v in THRESHOLDS.items()}


def test_quantize_static_makes_our_scales_of_it(tmp_path):
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 13]>
        net (float[1, 4] x) => (float[1, 3] y)
        <float[4, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}>
        { y = MatMul (x, w) }
    """)
    onnx.save(model, tmp_path / "net.onnx")
    write_onnxruntime_table(tmp_path / "t.json", {"x": 1.7, "y": 0.3}, method="MinMax")
    quantize_static(
        tmp_path / "net.onnx",
        tmp_path / "int8.onnx",
        None,
        calibration_cache_path=tmp_path / "t.json",
        activation_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True},
    )
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    assert constants["x_scale"] == pytest.approx(1.7 / 127, rel=1e-7)
    assert constants["y_scale"] == pytest.approx(0.3 / 127, rel=1e-7)
    assert constants["x_zero_point"] == 0


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"x": {"CLS": "TensorData", "avg": 0.0, "std": 1.0}}, "tensor 'x' must have `lowest` and `highest`"),
        ({"x": {"lowest": -1.0}}, "tensor 'x' must have `lowest` and `highest`"),
        ({"x": [1.0]}, "tensor 'x' must have `lowest` and `highest`"),
        ({"x": [[-1.0, -2.0], [1.0, 2.0]]}, "tensor 'x' .* ranges per channel"),
        ({"x": 1.0}, "tensor 'x' must have `lowest` and `highest`"),
        ({"x": [-1.0, True]}, "tensor 'x' must have `lowest` and `highest`"),
        ({"x": ["-1", "1"]}, "tensor 'x' must have `lowest` and `highest`"),
        ({"x": [2.0, 1.0]}, r"tensor 'x' must have a range, got \[2.0, 1.0\]"),
        ({"x": [float("nan"), 1.0]}, r"tensor 'x' must have a range, got \[nan, 1.0\]"),
        ('{"\\ud800": [0, 1]}', "got '.ud800', which is not Unicode text"),
        ('{"x": [0, 1],\n "x": [0, 2]}', "keys must be unique, got 'x' twice"),
        ('{"x": [0, 1],\n]', "line 2: must be JSON, got '.* at column 1'"),
        ("[1]", r"line 1: must be a JSON object, got '\[1\]'"),
        (100_000 * "[", "nested too deeply"),
        ({"CLS": "TensorsData", "data": [1]}, "`data` must be an object of tensors, got list"),
        ({}, "must have at least one tensor"),
    ],
)
def test_a_damaged_table_is_an_error_that_names_the_tensor_or_the_line(tmp_path, document, message):
    with pytest.raises(InvalidInputError, match=message) as error:
        read_onnxruntime_table(save(tmp_path / "t.json", document))
    assert "t.json`" in str(error.value)


def test_ranges_per_channel_are_refused(tmp_path):
    save_tensors_data(tensors(per_channel=[1.0, 2.0]), tmp_path / "t.json")
    with pytest.raises(InvalidInputError, match=r"tensor 'per_channel' .* ranges per channel"):
        read_onnxruntime_table(tmp_path / "t.json")


def test_what_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(InvalidInputError, match=r"`method` must be one of MinMax, Entropy, .* got 'KL'"):
        write_onnxruntime_table(tmp_path / "t.json", {"x": 1.0}, method="KL")
    with pytest.raises(InvalidInputError, match="tensor 'x' must have a value that float32 can hold, got 1e"):
        write_onnxruntime_table(tmp_path / "t.json", {"x": 1e39})
    with pytest.raises(InvalidInputError, match="without a final colon, got 'x:'"):
        write_onnxruntime_text(tmp_path / "t", {"x:": 1.0})
    with pytest.raises(InvalidInputError, match=r"contains '.n'"):
        write_onnxruntime_text(tmp_path / "t", {"x\n": 1.0})
    assert not list(tmp_path.iterdir())


def test_the_text_keeps_all_of_the_thresholds(tmp_path):
    thresholds = {"x": 1 / 3, " a: b": 5e-324, "größe 1.5": 1.7e308}
    write_onnxruntime_text(tmp_path / "t", thresholds)
    assert read_onnxruntime_text(tmp_path / "t") == thresholds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x 1.0\ny\n", "line 2: must be a name, a space and T, got 'y'"),
        ("\n 1.0\n", "line 2: must be a name, a space and T"),
        ("x 1.0\nx 2.0\n", "line 2: must be a name that is not already in line 1"),
        ("x 1_0\n", "line 1: must be a number as T for tensor 'x', got '1_0'"),
        ("x \u0661\n", "for tensor 'x', got"),
        ("prob: 38150000\n", "line 1: must be a name without a final colon, a space and T"),
        ("a\rb 1.0\n", "contains '.r'"),
    ],
)
def test_a_damaged_text_is_an_error_that_names_the_line(tmp_path, text, message):
    (tmp_path / "t").write_bytes(text.encode())
    with pytest.raises(InvalidInputError, match=message):
        read_onnxruntime_text(tmp_path / "t")


@pytest.mark.parametrize("value", ["-1.0", "0.0", "nan", "inf", "1e999"])
def test_a_tensor_without_a_usable_t_is_left_out_and_named(tmp_path, value):
    (tmp_path / "t").write_text(f"x {value}\ny 2.0\n")
    with pytest.warns(CalibrationWarning, match="1 tensors of .*t` have no usable scale and are left out: `x`"):
        assert read_onnxruntime_text(tmp_path / "t") == {"y": 2.0}


@pytest.mark.parametrize("ends", ["[-1.0, Infinity]", "[0.0, 0.0]", "[0, 1e999]", "[0, 1" + 5000 * "0" + "]"])
def test_a_tensor_without_a_usable_range_is_left_out_and_named(tmp_path, ends):
    (tmp_path / "t.json").write_text('{"x": ' + ends + ', "y": [-2.0, 1.0]}')
    with pytest.warns(CalibrationWarning, match="have no usable scale and are left out: `x`"):
        assert read_onnxruntime_table(tmp_path / "t.json") == {"y": 2.0}
