"""Tables of embeddings as integers."""

import numpy as np
import onnx
import pytest

from klquant.backends.onnx import calibrate, inspect, quantize, verify
from klquant.backends.onnx.model.graph import read_graph
from klquant.backends.onnx.qdq.embeddings import embeddings
from support.onnx_models import array, build, run

pytestmark = pytest.mark.filterwarnings("ignore::klquant.errors.CalibrationWarning")
ENGINES = ("onnxruntime", "openvino")
IDS = {"x": np.random.default_rng(0).integers(0, 1024, (3, 5))}
INPUT = "int64[n, 5] x"


def table(*shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32) * np.linspace(0.01, 10, shape[-1], dtype="f")


def quantized(model, engine, **options):
    if engine == "openvino":
        pytest.importorskip("openvino", reason="needs OpenVINO")
    found = quantize(model, calibrate(model, [IDS], criterion="max"), engine=engine, **options)
    assert verify(found.model, [IDS], engine).wrong == []
    return found


def encoder(body="e = Gather(t, x) y = MatMul(e, w)", **constants):
    return build(INPUT, "float y", body, t=table(1024, 32), w=(32, 4), **constants)


def gathers(found, engine):
    return [node.int8 for node in inspect(found.model, engine) if node.op_type == "Gather"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_table_is_gathered_in_integers_with_a_scale_for_each_element(engine):
    found = quantized(encoder("e = Gather(t, x) y = Identity(e) z = MatMul(e, w)"), engine)
    assert not found.skipped
    assert gathers(found, engine) == [True]
    assert array(found.model, "t_quantized").dtype == np.int8
    assert "t" not in {tensor.name for tensor in found.model.graph.initializer}
    steps, values = np.abs(table(1024, 32)).max(0) / 127, table(1024, 32)[IDS["x"]]
    assert (np.abs(run(found.model, **IDS)["y"] - values) <= 0.5001 * steps).all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "body",
    [
        "e = Gather(t, x) j = Abs(x) f = Gather(t, j) y = Add(e, f)",
        "e = Gather(t, x) m = MatMul(e, w) y = Add(m, m)",
        "e = Gather(t, x) v = Transpose(t) y = MatMul(e, v)",
        "e = Gather(t, x) r = Relu(e) y = MatMul(r, w)",
    ],
)
def test_whatever_reads_the_vectors(body, engine):
    found = quantized(encoder(body), engine)
    assert not found.skipped
    assert sum(tensor.name.startswith("t_quantized") for tensor in found.model.graph.initializer) <= 2
    assert gathers(found, engine) == [True] * body.count("Gather")


@pytest.mark.parametrize("shape", [(1024, 8), (100, 32), (1024, 2, 4)])
def test_coordinates_and_small_tables_stay(shape):
    model = build(INPUT, "float y", "y = Gather(t, x)", t=table(*shape))
    assert not embeddings(read_graph(model), ())


@pytest.mark.parametrize("body", ["y = Gather<axis=1>(t, x)", "y = GatherElements(t, x)", "y = Gather(i, x)"])
def test_other_gathers_stay(body):
    model = build("int64[n, 32] x", "float y", body, t=table(1024, 32), i=table(1024 * 32))
    assert not embeddings(read_graph(model), ())


@pytest.mark.parametrize("kept", ["Gather", "gather0", "e"])
def test_an_excluded_table_stays_in_floating_point(kept):
    found = quantized(encoder(), "onnxruntime", exclude=[kept])
    assert found.skipped["gather0"] == "excluded by the settings"
    assert "t" in {tensor.name for tensor in found.model.graph.initializer}


def test_tensorrt_has_no_integers_in_tables():
    found = quantize(encoder(), {"e": 3.0}, engine="tensorrt")
    assert "cannot be quantized" in found.skipped["gather0"]
    onnx.checker.check_model(found.model)
