"""Peer: the calibrators of onnxruntime and its ``quantize_static``, with the options that its documentation advises."""

import contextlib
import io
import itertools
import tempfile
from pathlib import Path

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
from onnxruntime.quantization.calibrate import create_calibrator, load_tensors_data, save_tensors_data
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry
from onnxruntime.quantization.shape_inference import quant_pre_process

OPERATORS = sorted({*QLinearOpsRegistry, *QDQRegistry})  # the operators that quantize_static observes
METHODS = {
    "MinMax": (CalibrationMethod.MinMax, {}),
    "Entropy": (CalibrationMethod.Entropy, {}),  # 128 bins, 128 levels
    "Entropy, 2001 bins, 255 levels": (CalibrationMethod.Entropy, {"num_bins": 2001, "num_quantized_bins": 255}),
    "Percentile": (CalibrationMethod.Percentile, {}),  # 99.999
}
DEFAULT = "default"
VARIANTS = {
    DEFAULT: {},  # INT8, asymmetric, one scale for a weight
    "uint8, per channel": {"activation_type": QuantType.QUInt8, "per_channel": True},  # advised for x86 with VNNI
    "int8 symmetric, per channel": {"per_channel": True, "extra_options": {"ActivationSymmetric": True}},  # for GPUs
}


class Reader(CalibrationDataReader):
    """Feeds batches to the only input of a model."""

    def __init__(self, name, batches):
        self._feeds = ({name: batch} for batch in batches)

    def get_next(self):
        return next(self._feeds, None)


def preprocess(model, path):
    """Write a model after the preparation that onnxruntime recommends before quantization."""
    quant_pre_process(model, str(path))


def calibrate(method, path, name, batches, *, stride=None):
    """Return the ranges of a method, by tensor. With `stride` it takes that many batches at a time, to save memory."""
    kind, options = METHODS[method]
    feeds = iter(batches)
    parts = iter(lambda: list(itertools.islice(feeds, stride)), []) if stride else [feeds]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        augmented = str(Path(folder) / "augmented.onnx")
        calibrator = create_calibrator(Path(path), OPERATORS, augmented, calibrate_method=kind, extra_options=options)
        for part in parts:
            calibrator.collect_data(Reader(name, part))
        return calibrator.compute_data()


def save(ranges, path):
    save_tensors_data(ranges, path)


def thresholds(path):
    """Return the larger end of each range in a file, by tensor."""
    return {name: float(np.abs(each.range_value).max()) for name, each in load_tensors_data(path).items()}


def quantize(path, ranges, method, variant, target):
    """Write the quantized model, with ranges from a file."""
    options = {"calibrate_method": METHODS[method][0], **VARIANTS[variant]}
    quantize_static(str(path), str(target), calibration_cache_path=ranges, **options)


def quantize_at_once(path, target, name, batches, variant):
    """Write the model of a plain ``quantize_static`` call, which uses MinMax."""
    quantize_static(str(path), str(target), Reader(name, batches), **VARIANTS[variant])
