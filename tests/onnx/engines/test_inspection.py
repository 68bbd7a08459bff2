import onnx
import pytest

from klquant.backends.onnx.calibration import calibrate
from klquant.backends.onnx.engines.inspection import NodeReport, OperatorCount, inspect, summarize
from klquant.backends.onnx.engines.tensorrt import check_tensorrt
from klquant.backends.onnx.quantization import quantize
from klquant.errors import InvalidInputError, ModelError
from support import onnx_networks
from support.onnx_models import build
from support.qdq_models import INT8, INT8_LOWEST, Builder, residual_block

ENGINES = ("onnxruntime", "openvino", "tensorrt")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_float_model_is_all_floating_point(engine):
    body = "c = Conv(x, w) r = Relu(c) p = MaxPool<kernel_shape = [2, 2]>(r) f = Flatten(p) y = Gemm(f, g)"
    reports = inspect(build("float[1, 3, 8, 8] x", "float[1, 5] y", body, w=(4, 3, 3, 3), g=(100, 5)), engine)
    assert [report.op_type for report in reports] == ["Conv", "Relu", "MaxPool", "Flatten", "Gemm"]
    assert not any(report.int8 for report in reports)
    assert all(report.reason for report in reports)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_node_has_a_report(engine):
    model = residual_block(INT8, INT8_LOWEST, sum_of_quantized=True)
    before = model.SerializeToString(deterministic=True)
    reports = inspect(model, engine)
    assert [report.name for report in reports] == (
        ["conv0", "relu0", "conv1", "add0", "relu1", "globalaveragepool0", "flatten0", "gemm0"]
    )
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("engine", ENGINES)
def test_nodes_may_lack_names_or_share_them(engine):
    model = residual_block(INT8, INT8, sum_of_quantized=False)
    expected = inspect(model, engine)
    for node in model.graph.node:
        node.name = "same" if node.op_type == "Conv" else ""
    reports = inspect(model, engine)
    assert [report.int8 for report in reports] == [report.int8 for report in expected]
    assert [report.name for report in reports][:4] == ["same", "relu0", "same", "add0"]


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_is_printed(engine, capfd):
    inspect(residual_block(INT8, INT8, sum_of_quantized=False), engine)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("engine", ENGINES)
def test_shapes_and_constants_are_no_nodes_of_interest(engine):
    build = Builder()
    size = build.node("Shape", "x")
    y = build.node("Reshape", build.node("Tanh", "x"), build.node("Identity", size))
    y = build.node("Add", y, build.node("Exp", build.floats(8)))
    assert [report.op_type for report in inspect(build.model(y), engine)] == ["Tanh", "Reshape", "Add"]


def test_a_path_serves_as_well(tmp_path):
    model = residual_block(INT8, INT8, sum_of_quantized=False)
    onnx.save(model, tmp_path / "model.onnx")
    assert inspect(tmp_path / "model.onnx", "onnxruntime") == inspect(model, "onnxruntime")
    assert inspect(str(tmp_path / "model.onnx"), "tensorrt") == inspect(model, "tensorrt")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_files_that_are_not_models(tmp_path):
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(InvalidInputError, match=r"text\.onnx.* must hold an ONNX model"):
        inspect(tmp_path / "text.onnx", "onnxruntime")
    (tmp_path / "empty.onnx").touch()
    with pytest.raises(InvalidInputError, match=r"empty\.onnx` must hold an ONNX model, got one without outputs"):
        inspect(tmp_path / "empty.onnx", "tensorrt")
    with pytest.raises(FileNotFoundError):
        inspect(tmp_path / "none.onnx", "onnxruntime")


def test_an_unknown_engine():
    with pytest.raises(InvalidInputError, match="tensorrt, onnxruntime, openvino, got 'tvm'"):
        inspect(residual_block(INT8, INT8, sum_of_quantized=False), "tvm")


def test_a_model_that_onnxruntime_refuses(capfd):
    model = residual_block(INT8, INT8, sum_of_quantized=False)
    model.graph.node[-1].op_type = "Mystery"
    with pytest.raises(ModelError, match="Mystery"):
        inspect(model, "onnxruntime")
    assert capfd.readouterr() == ("", "")


def test_summary_by_operator():
    reports = [NodeReport("a", "Conv", True, "executed"), NodeReport("b", "Relu", False, "why")]
    reports += [NodeReport("c", "Conv", False, "because"), NodeReport("d", "Conv", False, "because")]
    assert summarize(reports) == [
        OperatorCount("Conv", 1, 3, {"because": 2}),
        OperatorCount("Relu", 0, 1, {"why": 1}),
    ]


@pytest.mark.parametrize("network", ["VGG", *onnx_networks.digits_networks.TRAINED])
def test_engines_execute_the_layers_of_quantized_networks_in_int8(network):
    model = onnx_networks.load(network)
    calibration = calibrate(model, onnx_networks.digits()[0][:1], criterion="max")
    for engine in ENGINES:
        reports = inspect(quantize(model, calibration, engine=engine).model, engine)
        layers = [report for report in reports if report.op_type in ("Conv", "Gemm")]
        assert len(layers) > 4
        assert [report for report in layers if not report.int8] == []
        assert engine != "tensorrt" or check_tensorrt(quantize(model, calibration).model) == []
