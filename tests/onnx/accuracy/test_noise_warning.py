import warnings

import numpy as np
import pytest

from klquant import CalibrationWarning
from klquant.backends.onnx import calibrate, quantize
from support.onnx_models import build

RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(16, 8)).astype(np.float32)
BATCHES = [(RNG.normal(size=(8, 16)) * 10.0 ** RNG.uniform(-4, 0, (8, 1))).astype(np.float32) for _ in range(2)]


def messages(body, **constants):
    model = build("float[n, 16] x", "int64 y" if "ArgMax" in body else "float y", body, w=WEIGHT, **constants)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        calibration = calibrate(model, BATCHES, criterion="max")
        warnings.simplefilter("always")
        quantize(model, calibration, engine="openvino", batches=BATCHES)
    return [str(one.message) for one in caught if one.category is CalibrationWarning]


def test_outputs_of_mostly_noise_are_a_warning():
    """Spectrograms do this: the logarithm makes small products matter as much as large ones."""
    (message,) = messages("c = MatMul(x, w) s = Mul(c, c) e = Add(s, t) y = Log(e)", t=np.full(1, 1e-12, np.float32))
    assert "the quantized model is far from the float model: SQNR" in message
    assert "dB at output `y`; tune() and `klquant tune`" in message


@pytest.mark.parametrize("body", ["y = MatMul(x, w)", "c = MatMul(x, w) r = Relu(c) y = ArgMax(r)"])
def test_good_and_integer_outputs_are_none(body):
    assert messages(body) == []
