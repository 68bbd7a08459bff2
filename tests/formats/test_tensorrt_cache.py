import math
import struct

import numpy as np
import pytest

from klquant.backends.formats import CalibrationCache, read_tensorrt_cache, write_tensorrt_cache
from klquant.errors import CalibrationWarning, InvalidInputError

REAL = """TRT-8401-EntropyCalibration2
data: 3c010a14
(Unnamed Layer* 0) [Convolution]_output: 3d6969df
input_1:0: 4000890a
a: b: 3aff0001
(Unnamed Layer* 64) [Shuffle]_output: 0
größe: 00800000
"""


@pytest.fixture
def cache(tmp_path):
    def write(content):
        path = tmp_path / "net.cache"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_the_scales_of_known_caches(cache):
    found = read_tensorrt_cache(cache("TRT-7202-EntropyCalibration2\nprob: 3c010a14\ndata: 4000890a\n"))
    assert found["prob"] == pytest.approx((2048 + 0.5) / 2048, rel=1e-7)
    assert found["prob"] / 127 == pytest.approx(0.0078759379, rel=1e-8)
    assert found["data"] == pytest.approx(255.062, rel=1e-6)


def test_thresholds_become_the_digits_of_a_known_cache(tmp_path):
    path = tmp_path / "new" / "net.cache"
    write_tensorrt_cache(path, {"prob": (2048 + 0.5) / 2048, "data": np.float64(127.0)}, header="TRT-100300-MinMaxCal")
    assert path.read_bytes() == b"TRT-100300-MinMaxCal\nprob: 3c010a14\ndata: 3f800000\n"


def test_a_cache_keeps_its_bytes_and_its_order(cache, tmp_path):
    found = CalibrationCache.load(cache(REAL))
    assert found.header == "TRT-8401-EntropyCalibration2"
    assert list(found.scales) == [line.rpartition(": ")[0] for line in REAL.splitlines()[1:]]
    found.save(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == REAL.encode()


@pytest.mark.parametrize(
    "content",
    [
        REAL.replace("\n", "\r\n"),
        REAL.rstrip("\n"),
        REAL.replace("\n", "\n\n") + "\n \n",
        "\ufeff" + REAL,
        REAL.replace("3d6969df", "3D6969DF").replace(": 00800000", ": 800000"),
    ],
    ids=["windows", "no last line end", "blank lines", "byte order mark", "digits"],
)
def test_a_cache_that_was_edited_means_the_same(cache, tmp_path, content):
    CalibrationCache.load(cache(content)).save(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == REAL.encode()


def test_thresholds_give_the_scales_back_bit_for_bit(cache, tmp_path):
    bits = np.random.default_rng(0).integers(1, 0x7F800000, 2000)
    bits = [1, 2, 0x7FFFFF, 0x800000, 0x7F7FFFFF, *bits.tolist()]
    lines = [f"{k}: {value:08x}\n" for k, value in enumerate(bits)]
    path = cache("".join(["TRT-8601-EntropyCalibration2\n", *lines]))
    before = path.read_bytes()
    write_tensorrt_cache(path, read_tensorrt_cache(path))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("digits", "value"),
    [("0", "0.0"), ("0000", "0.0"), ("00000000", "0.0"), ("80000000", "-0.0"), ("7f800000", "inf"),
     ("7fc00000", "nan"), ("bc010a14", "-1.000")],
)  # fmt: skip
def test_a_tensor_without_a_usable_scale_is_left_out_and_named(cache, digits, value):
    """An infinite scale is in caches of TensorRT 7; the rest of such a cache is good."""
    path = cache(f"TRT-1-X\nconst: {digits}\na: 3c010a14\n")
    message = rf"1 tensors of the calibration cache have no usable scale and are left out: `const` \({value}"
    with pytest.warns(CalibrationWarning, match=message) as record:
        assert list(read_tensorrt_cache(path)) == ["a"]
    assert record[0].filename == __file__


def test_blanks_at_the_ends_of_lines_are_read(cache):
    """Paddle2ONNX writes one behind the header."""
    path = cache("TRT-8001-EntropyCalibration2 \nx: 3c010a14\na b : 3c010a14\t \r\n")
    assert CalibrationCache.load(path).header == "TRT-8001-EntropyCalibration2"
    assert list(read_tensorrt_cache(path)) == ["x", "a b "]


@pytest.mark.filterwarnings("ignore:1 tensors:klquant.errors.CalibrationWarning")
@pytest.mark.parametrize("body", ["", "const: 0\n"])
def test_a_cache_without_any_scale_is_an_error(cache, body):
    with pytest.raises(InvalidInputError, match=r"net.cache` must have at least one tensor"):
        read_tensorrt_cache(cache("TRT-8601-EntropyCalibration2\n" + body))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "net.cache` must be a table of scales, got an empty file"),
        (" \r\n\n", "got an empty file"),
        ("data: 3c010a14\n", "line 1: must be TRT-<version>-<calibrator>, got 'data: 3c010a14'"),
        ("\nTRT-8601\n", "line 2: must be TRT-"),
        ("TRT-1-X\n\na 3c010a14\n", "line 3: must be `name: ` and up to 8 hexadecimal digits, got 'a 3c010a14'"),
        ("TRT-1-X\na: 3c010a141\n", "line 2: must be `name: `"),
        ("TRT-1-X\na: \n", "line 2: must be `name: `"),
        ("TRT-1-X\na: 0x3c0\n", "line 2: must be `name: `"),
        ("TRT-1-X\na: 3_c0\n", "line 2: must be `name: `"),
        ("TRT-1-X\na: 1.5\n", "line 2: must be `name: `"),
        ("TRT-1-X\n: 3c010a14\n", "line 2: must be `name: `"),
        ("TRT-1-X\na\rb: 3c010a14\n", "line 2: must be a name without line breaks"),
        ("TRT-1-X\na: 3c010a14\na: 3c010a14\n", "line 3: must be a name that is not already in line 2, got 'a'"),
        (b"TRT-1-X\n\xff\xfe\n", "line 2: must be UTF-8 text, got 'byte 0xff"),
        (b"\xef\xbb\xbfTRT-1-X\n\nb\xe9: 0\n", "line 3: must be UTF-8 text, got 'byte 0xe9"),
        (b"TRT-1-X\na\0: 3c010a14\n", "line 2: must be text, got 'a NUL byte'"),
        (b"TRT-1-X\n" + 10**5 * b"x", "got 'x{79}[.]{3}$"),
    ],
)
def test_a_damaged_cache_is_an_error_that_says_where(cache, content, message):
    with pytest.raises(InvalidInputError, match=message):
        CalibrationCache.load(cache(content))


def test_a_missing_file_is_python_s_own_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_tensorrt_cache(tmp_path / "none")


@pytest.mark.parametrize("value", [0, 0.0, -1.0, math.nan, math.inf, -math.inf, None, "1", 10**400, [1.0]])
def test_a_threshold_that_is_not_positive_names_the_tensor(tmp_path, value):
    with pytest.raises(InvalidInputError, match="tensor 'conv' must have a positive, finite T, got"):
        write_tensorrt_cache(tmp_path / "x", {"a": 1.0, "conv": value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [1e300, 1e-44])
def test_a_scale_beyond_float32_names_the_tensor(tmp_path, value):
    with pytest.raises(InvalidInputError, match="tensor 'conv' must have a value that float32 can hold, got"):
        write_tensorrt_cache(tmp_path / "x", {"a": 1.0, "conv": value})


@pytest.mark.parametrize("name", ["", "a\nb", "a\r", "a\0", "\ud800", 3])
def test_a_name_that_cannot_be_written_is_an_error_and_the_old_file_stays(cache, name):
    path = cache(REAL)
    with pytest.raises(InvalidInputError, match="names that it can write, got"):
        write_tensorrt_cache(path, {"a": 1.0, name: 1.0})
    with pytest.raises(InvalidInputError, match="cannot contain the name"):
        CalibrationCache("TRT-1-X", {name: 1.0}).save(path)
    assert path.read_bytes() == REAL.encode()


@pytest.mark.parametrize("header", ["", "TRT-8601", "TRT-8601-Entropy\n", "8601-Entropy"])
def test_another_form_of_header_is_an_error(tmp_path, header):
    with pytest.raises(InvalidInputError, match="`header` must be TRT-<version>-<calibrator>, got"):
        write_tensorrt_cache(tmp_path / "x", {"a": 1.0}, header=header)


def test_an_empty_table_is_an_error(tmp_path):
    with pytest.raises(InvalidInputError, match="must have at least one tensor"):
        write_tensorrt_cache(tmp_path / "x", {})


def test_a_cache_made_of_scales_is_checked_when_it_is_saved(tmp_path):
    for scale in (-1.0, math.nan, math.inf):
        with pytest.raises(InvalidInputError, match="tensor 'a' must have a value that float32 can hold"):
            CalibrationCache("TRT-1-X", {"a": scale}).save(tmp_path / "x")
    CalibrationCache("TRT-1-X", {"a": np.float32(0.1), "b": 0}).save(tmp_path / "x")
    assert (tmp_path / "x").read_text() == f"TRT-1-X\na: {struct.pack('>f', 0.1).hex()}\nb: 0\n"
