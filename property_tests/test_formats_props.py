"""A table is read back as it was written, with any names. Any file gives a table or an InvalidInputError."""

import json
import math
import struct
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klquant.backends.formats import FORMATS, CalibrationCache, NcnnTable, read_table, write_table
from klquant.errors import CalibrationWarning, InvalidInputError

ANY_NAME = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
LINE_NAME = st.text(st.characters(exclude_characters="\0\n\r", exclude_categories=["Cs"]), min_size=1)
WORD = st.text(st.characters(exclude_characters="\0\n\r \t\v\f", exclude_categories=["Cs"]), min_size=1, max_size=60)
NAMES = {
    "json": ANY_NAME,
    "csv": ANY_NAME,
    "onnxruntime": ANY_NAME,
    "tensorrt": LINE_NAME,
    "onnxruntime-text": LINE_NAME.filter(lambda name: not name.endswith(":")),
    "ncnn": WORD.filter(lambda name: "_param_" not in name),
}
EXACT = ["json", "csv", "onnxruntime-text"]
FLOAT32_BITS = st.integers(1, 0x7F7FFFFF)
POSITIVE = st.floats(0, exclude_min=True, allow_infinity=False)
MODERATE = st.floats(1e-35, 1e35)
WORDS = (
    "TRT-8601-EntropyCalibration2 { } [ ] : , tensor threshold klquant thresholds tensors schema 1 0 -1 1e999 NaN inf "
    '3c010a14 7f800000 lowest highest CLS TensorsData data a_param_0 a scale null \\ud800 " \0'
)
PIECES = st.sampled_from([*WORDS.split(), " ", "\n", "\r\n", "\r", ": "])
SCALARS = (
    st.none() | st.booleans() | st.floats() | st.integers() | st.sampled_from(["TensorsData", "numpy.array", "1.5"])
)
KEYS = st.sampled_from(
    ["klquant", "schema", "tensors", "threshold", "scale", "CLS", "data", "lowest", "highest", "conv1"]
)
DOCUMENTS = st.recursive(SCALARS, lambda some: st.lists(some, max_size=3) | st.dictionaries(KEYS, some, max_size=4))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("formats") / "table"


def outcome(call):
    """Return what a call returns, or the error that it may raise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        try:
            return call()
        except InvalidInputError as error:
            return error


def float32(bits):
    return struct.unpack(">f", bits.to_bytes(4, "big"))[0]


@pytest.mark.parametrize("kind", FORMATS)
@given(data=st.data())
def test_a_table_is_read_back(path, kind, data):
    numbers = POSITIVE if kind in EXACT else MODERATE
    thresholds = data.draw(st.dictionaries(NAMES[kind], numbers, min_size=1, max_size=5))
    write_table(path, thresholds, format=kind)
    found = read_table(path, format=kind)
    assert list(found) == list(thresholds)
    if kind in EXACT:
        assert found == thresholds
    assert all(math.isclose(found[name], thresholds[name], rel_tol=6e-8) for name in found)
    write_table(path, found, format=kind)
    assert read_table(path, format=kind) == found


@given(st.dictionaries(LINE_NAME, FLOAT32_BITS | st.just(0), max_size=5), st.sampled_from(["MinMaxCalibration", "X2"]))
def test_a_tensorrt_cache_keeps_its_bytes(path, bits, calibrator):
    lines = [f"{name}: {value:08x}\n" if value else f"{name}: 0\n" for name, value in bits.items()]
    content = f"TRT-8601-{calibrator}\n{''.join(lines)}".encode()
    path.write_bytes(content)
    CalibrationCache.load(path).save(path)
    assert path.read_bytes() == content


@given(st.lists(FLOAT32_BITS, min_size=1))
def test_every_float32_survives_the_way_through_thresholds(bits):
    """T = 127 * scale has at most 31 significant bits, so float64 holds it and the division gives the scale back."""
    scales = {str(k): float32(value) for k, value in enumerate(bits)}
    cache = CalibrationCache("TRT-8601-EntropyCalibration2", scales)
    assert CalibrationCache.of(cache.thresholds(), header=cache.header) == cache
    table = NcnnTable({}, scales)
    assert NcnnTable.of(table.thresholds()) == table


@pytest.mark.parametrize("kind", [None, *FORMATS])
@given(
    content=st.binary()
    | st.lists(PIECES, max_size=20).map(lambda pieces: "".join(pieces).encode())
    | st.text(st.characters(exclude_categories=["Cs"])).map(str.encode)
    | DOCUMENTS.map(lambda document: json.dumps(document).encode()),
    suffix=st.sampled_from(["", ".csv", ".json", ".cache", ".table"]),
)
def test_any_file_is_a_table_or_a_named_error(path, kind, content, suffix):
    path = path.with_suffix(suffix)
    path.write_bytes(content)
    found = outcome(lambda: read_table(path, format=kind))
    if isinstance(found, InvalidInputError):
        assert "table" in str(found)
    else:
        assert found
        assert all(isinstance(name, str) and 0 < value < math.inf for name, value in found.items())
        write_table(path, found, format="json")  # a table that was read can be written


@pytest.mark.parametrize("kind", FORMATS)
@given(name=st.text(), value=st.floats())
def test_any_name_and_number_is_written_and_read_back_or_a_named_error(path, kind, name, value):
    error = outcome(lambda: write_table(path, {name: value}, format=kind))
    if error is None:
        assert list(read_table(path, format=kind)) == [name]
    else:
        assert repr(name)[:60] in str(error)
