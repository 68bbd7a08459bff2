import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from klquant.backends.onnx.calibration import calibrate
from klquant.backends.onnx.engines.inspection import inspect
from klquant.backends.onnx.engines.openvino import _core
from klquant.backends.onnx.quantization import quantize
from klquant.errors import MissingDependencyError, ModelError
from support.onnx_models import build
from support.qdq_models import INT8, UINT8, UINT8_MIDDLE, Builder, residual_block

X = np.random.default_rng(0).normal(size=(1, 4, 8, 8)).astype(np.float32)


def reports(model):
    return {report.name: report for report in inspect(model, "openvino")}


def layer(op_type="Conv", quantized=True, quantized_weight=True, relu=False, output=True):
    build = Builder()
    x = build.qdq("x") if quantized else "x"
    weight = (
        build.weight(4, 4, 3, 3, axis=int(op_type == "ConvTranspose")) if quantized_weight else build.floats(4, 4, 3, 3)
    )
    y = build.node(op_type, x, weight)
    y = build.node("Relu", y) if relu else y
    return build.model(build.qdq(y) if output else y)


@pytest.mark.parametrize("op_type", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("output", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_layers_in_int8(op_type, output, relu):
    """OpenVINO needs no quantizer after a layer and allows a Relu before it."""
    found = reports(layer(op_type, relu=relu, output=output))
    assert all(report.int8 for report in found.values())
    assert "onvolution" in found[f"{op_type.lower()}0"].reason


@pytest.mark.parametrize(("quantized", "quantized_weight", "bare"), [(False, True, "x"), (True, False, "c2")])
def test_layers_in_floating_point(quantized, quantized_weight, bare):
    report = reports(layer(quantized=quantized, quantized_weight=quantized_weight))["conv0"]
    assert not report.int8
    assert report.reason.endswith(f"; its input `{bare}` has no DequantizeLinear")


@pytest.mark.parametrize("shape", [(16, 4), (2, 3, 4, 4)])
def test_a_product_that_is_an_output_with_zero_points(shape):
    """OpenVINO gives the name of the output to the operator that corrects for the zero point."""
    build = Builder()
    y = build.node("MatMul", build.qdq("x", (np.uint8, 20)), build.weight(4, 8, axis=1))
    report = reports(build.model(y, shape=shape))["matmul0"]
    assert report.int8
    assert "FullyConnected" in report.reason


def test_products_and_poolings():
    build = Builder()
    y = build.qdq(build.node("MaxPool", build.qdq("x"), kernel_shape=[2, 2]))
    y = build.qdq(build.node("GlobalAveragePool", y))
    y = build.qdq(build.node("Flatten", y))
    found = reports(build.model(build.gemm(y, 10, 4, build.floats(10))))
    assert [report.op_type for report in found.values()] == ["MaxPool", "GlobalAveragePool", "Flatten", "Gemm"]
    assert all(report.int8 for report in found.values())


def test_a_product_whose_weight_is_transposed():
    build = Builder()
    y = build.node("MatMul", build.qdq("x"), build.weight(16, 8, axis=1))
    found = reports(build.model(build.node("Add", y, build.floats(8)), shape=(4, 16)))
    assert all(report.reason.startswith("executed as FullyConnected") for report in found.values())


def test_a_sum_whose_first_operand_is_int8():
    """OpenVINO names its kernel int8 then."""
    build = Builder()
    x = build.qdq("x")
    y = build.conv(build.qdq(build.node("Relu", build.conv(x))))
    y = build.qdq(build.node("Relu", build.node("Add", x, y)))
    report = reports(build.model(build.conv(y)))["add0"]
    assert not report.int8
    assert re.search(" on [iu]8 and ", report.reason)  # and a floating-point type that depends on the CPU


def test_a_sum_of_int8_and_floating_point_is_floating_point():
    """Its narrowest input is int8, which OpenVINO reports as its precision."""
    found = reports(residual_block(INT8, INT8, sum_of_quantized=False))
    assert [name for name, report in found.items() if not report.int8] == ["add0", "relu1"]
    assert "Subgraph" in found["add0"].reason
    found = reports(residual_block(UINT8_MIDDLE, UINT8, sum_of_quantized=True))
    assert all(report.int8 for report in found.values())
    assert found["relu0"].reason.startswith("part of `conv0` (Convolution")


def test_a_model_that_openvino_does_not_know():
    node = onnx.helper.make_node("Mystery", ["x"], ["y"], domain="somewhere")
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "small", values[:1], values[1:])
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid(d, 17 if not d else 1) for d in ("", "somewhere")]
    )
    with pytest.raises(ModelError, match="Mystery"):
        reports(model)


def test_without_openvino(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr("klquant.backends.onnx.engines.openvino._core", _core.__wrapped__)
    with pytest.raises(MissingDependencyError, match="pip install openvino"):
        reports(layer())


def test_ctrl_c_after_several_models_does_not_crash():
    script = (
        "import os, signal, numpy as np\n"
        "from support.onnx_models import build\n"
        "from klquant.backends.onnx.execution import open_openvino\n"
        "model, x = build('float[n, 5] x', 'float y', 'y = MatMul(x, w)', w=(5, 4)), {'x': np.ones((2, 5), 'f')}\n"
        "def run():\n"
        "    with open_openvino(model) as one, open_openvino(model) as other:\n"
        "        one(['y'], x), other(['y'], x)\n"
        "run()\n"
        "signal.signal(signal.SIGINT, lambda *_: print('interrupted'))\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
    )
    folder = Path(__file__).parents[2]  # of tests/support
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=folder)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


def test_openvino_reports_nothing_about_its_use():
    """By default openvino forks a process for that when it is imported."""
    script = (
        "import os, onnx\n"
        "os.register_at_fork(before=lambda: os.write(1, b'forked'))\n"
        "from klquant.backends.onnx.engines.openvino import _import_openvino\n"
        "_import_openvino()\n"
        "assert os.environ.get('CI') == 'no'\n"
    )
    command, environment = [sys.executable, "-c", script], {**os.environ, "CI": "no"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == ""


@pytest.mark.parametrize(
    "body",
    [
        "c = Conv<pads=[1,1,1,1], group=4>(x, g, b) r = Relu(c) y = Conv<pads=[1,1,1,1], group=4>(r, g, b)",
        "c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) e = Conv<pads=[1,1,1,1]>(r, w, b) y = Add(e, r)",
    ],
)
def test_a_layer_in_int8_whose_bias_is_a_kernel_in_floating_point(body):
    """OpenVINO gives the sum with the bias the name of the layer, and calls the layer `<name>/WithoutBiases`."""
    weights = {"g": (4, 1, 3, 3)} if "g," in body else {"w": (4, 4, 3, 3)}
    model = build("float[1, 4, 8, 8] x", "float[1, 4, 8, 8] y", body, b=(4,), **weights)
    quantized = quantize(model, calibrate(model, [X], criterion="max"), engine="openvino").model
    found = [report for report in inspect(quantized, "openvino") if report.op_type == "Conv"]
    assert [report.int8 for report in found] == [True, True]
    assert found[1].reason.endswith("on u8 and i8")
