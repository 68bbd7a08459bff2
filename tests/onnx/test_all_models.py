"""Every model that a test of this folder writes down: whatever can be quantized is computed as it is written."""

import ast
import functools
import importlib.util
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest

from klquant.backends.onnx import calibrate, prepare, quantize
from klquant.backends.settings import ENGINES
from klquant.errors import CalibrationWarning, InvalidInputError
from support import onnx_networks

HERE = Path(__file__).parent
NETWORKS = ("VGG", *onnx_networks.digits_networks.TRAINED)


def written_down():
    """Yield the models of all calls of `build` that need nothing but what their module defines."""
    for path in sorted(HERE.rglob("test_*.py")):
        tree = ast.parse(path.read_text())
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "build"]
        names = vars(imported(path)) if calls and path != Path(__file__) else {}
        for call in calls:
            try:
                yield f"{path.stem}:{call.lineno}", eval(ast.unparse(call), dict(names))  # noqa: S307 (our own text)
            except NameError:
                continue  # it depends on the parameters of its test


@functools.cache
def imported(path):
    spec = importlib.util.spec_from_file_location(f"models_of_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def batch(model):
    """Return random values for the inputs, with a free size of 2."""
    rng, given = np.random.default_rng(3), prepare(model)
    values = [value for value in given.model.graph.input if value.name in given.graph.inputs]
    feed = {}
    for value in values:
        kind = value.type.tensor_type
        shape = [size.dim_value or 2 for size in kind.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        feed[value.name] = np.asarray(rng.normal(size=shape) if dtype.kind == "f" else np.ones(shape), dtype)
    return feed


def is_written(model, data, engine):
    """Return whether a model can be quantized, and then is computed as it is written."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        try:
            calibration = calibrate(model, data, criterion="max")
        except InvalidInputError:  # nothing to quantize, or other data needed
            return False
        quantize(model, calibration, engine=engine, batches=data, correct_bias=False)  # raises if one tensor differs
    return True


@pytest.mark.parametrize("engine", ENGINES)
def test_models_of_all_tests(engine):
    if engine == "openvino":
        pytest.importorskip("openvino", reason="needs OpenVINO")
    done = []
    for name, model in written_down():
        try:
            if is_written(model, [batch(model)], engine):
                done.append(name)
        except Exception as error:
            raise AssertionError(f"the model at {name}") from error
    assert len(done) > 25


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
def test_trained_networks(name, engine):
    if engine == "openvino":
        pytest.importorskip("openvino", reason="needs OpenVINO")
    assert is_written(onnx_networks.load(name), onnx_networks.digits()[0][:1], engine)
