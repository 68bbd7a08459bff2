"""onnxruntime's CalibrationDataReader as calibration data."""

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import CalibrationDataReader

from klquant.backends import onnx as kl_onnx
from klquant.errors import InvalidInputError

RNG = np.random.default_rng(0)
MODEL = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    net (float[n, 4] x) => (float[n, 3] y) { y = MatMul(x, w) }""")
MODEL.graph.initializer.append(onnx.numpy_helper.from_array(RNG.normal(size=(4, 3)).astype("f"), "w"))
BATCHES = [{"x": RNG.normal(size=(64, 4)).astype("f")} for _ in range(3)]


class Reader(CalibrationDataReader):
    """As in onnxruntime's examples: without a way back."""

    def __init__(self):
        self.left = iter(BATCHES)

    def get_next(self):
        return next(self.left, None)


class Rewindable(Reader):
    rewinds = 0

    def rewind(self):
        self.left = iter(BATCHES)
        self.rewinds += 1


class Bare:
    """Has only the methods that onnxruntime calls."""

    get_next, __init__ = Reader.get_next, Reader.__init__


@pytest.mark.parametrize("kind", [Reader, Rewindable, Bare])
@pytest.mark.parametrize("options", [{}, {"passes": 1}, {"num_batches": 2}, {"criterion": "auto"}])
def test_a_reader_gives_the_thresholds_of_its_batches(kind, options):
    found = kl_onnx.calibrate(MODEL, kind(), **options)
    expected = kl_onnx.calibrate(MODEL, BATCHES, **options)
    pairs = zip(found.thresholds.values(), expected.thresholds.values(), strict=True)
    assert all((one.threshold, one.criterion) == (other.threshold, other.criterion) for one, other in pairs)
    assert found.num_batches == expected.num_batches


def test_a_reader_serves_all_functions_one_after_the_other():
    reader = Rewindable()
    calibration = kl_onnx.calibrate(MODEL, reader, keep_bytes=0)
    assert reader.rewinds == 2  # nothing is kept in memory
    quantized = kl_onnx.quantize(MODEL, calibration, engine="onnxruntime", batches=reader, correct_bias=True)
    assert kl_onnx.verify(quantized, reader, "onnxruntime").num_batches == 3
    assert kl_onnx.compare(MODEL, quantized.model, reader, engine="onnxruntime").num_batches == 3
    assert kl_onnx.tune(MODEL, reader, engine="onnxruntime", target="1dB").trace.reached
    assert kl_onnx.sensitivity(MODEL, calibration, reader)
    kl_onnx.smooth(MODEL, reader)


def test_a_reader_at_its_end_is_named():
    reader = Reader()
    kl_onnx.calibrate(MODEL, reader)
    with pytest.raises(InvalidInputError, match=r"got a Reader whose get_next returns None.*make a new one"):
        kl_onnx.calibrate(MODEL, reader)
