import numpy as np
import onnx
import pytest

import klquant
from klquant.backends.onnx import compare
from support.onnx_models import build

RNG = np.random.default_rng(0)
W = RNG.normal(size=(5, 4)).astype(np.float32)
X = [RNG.normal(size=(n, 5)).astype(np.float32) for n in (4, 4, 2)]


def linear(weights):
    return build("float[n, 5] x", "float[n, 4] y", "y = MatMul(x, w)", w=weights)


FLOAT, OTHER = linear(W), linear(W + 0.3 * RNG.normal(size=W.shape).astype(np.float32))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_outputs_and_accuracy_are_those_of_numpy(engine):
    if engine == "openvino":
        pytest.importorskip("openvino")
    w, other = (onnx.numpy_helper.to_array(model.graph.initializer[0]) for model in (FLOAT, OTHER))
    x = np.concatenate(X)
    labels = (x @ w).argmax(1)
    found = compare(FLOAT, OTHER, X, engine=engine, labels=labels)
    (output,) = found.outputs
    noise = ((x @ w - x @ other) ** 2).sum()
    assert output.sqnr_db == pytest.approx(
        10 * np.log10(((x @ w) ** 2).sum() / noise), abs=0.02
    )  # OpenVINO computes in bfloat16 where the CPU can
    assert output.top1 == output.int8_accuracy == ((x @ other).argmax(1) == labels).mean() < 1
    assert output.float_accuracy == 1
    assert found.num_batches == 3
    assert found.float_ms > 0
    assert found.int8_ms > 0


def test_files_and_protos_have_the_same_size(tmp_path):
    onnx.save(FLOAT, tmp_path / "a.onnx")
    found = compare(tmp_path / "a.onnx", FLOAT, X, engine="onnxruntime")
    assert found.float_bytes == found.int8_bytes == (tmp_path / "a.onnx").stat().st_size
    assert found.sqnr_db == np.inf


def test_weights_beside_the_model_count(tmp_path):
    onnx.save(linear(W), tmp_path / "a.onnx", save_as_external_data=True, size_threshold=0)
    assert compare(tmp_path / "a.onnx", FLOAT, X, engine="onnxruntime").float_bytes > W.nbytes


def test_the_metric_gets_the_outputs_of_every_batch():
    seen = []

    def metric(floats, others):
        seen.append([[one["y"].shape for one in outputs] for outputs in (floats, others)])
        return 0.25

    assert compare(FLOAT, OTHER, X, engine="onnxruntime", metric=metric).metric == 0.25
    assert seen == [[[(4, 4), (4, 4), (2, 4)]] * 2]


def test_only_a_metric_compares_outputs_whose_shapes_depend_on_values():
    body = (
        "a = Abs (x) v = ReduceMax <axes = [1], keepdims = 0> (a) k = Greater (v, least) y = Compress <axis = 0> (a, k)"
    )
    floats, others = (build("float[n, 5] x", "float[m, 5] y", body, least=np.float32(least)) for least in (0.0, 1.5))

    def kept(first, second):
        return sum(len(one["y"]) for one in second) / sum(len(one["y"]) for one in first)

    found = compare(floats, others, X, engine="onnxruntime", metric=kept)
    assert 0 < found.metric < 1
    assert np.isnan(found.outputs[0].sqnr_db)
    assert f"metric {found.metric:.1f}" in str(found)
    with pytest.raises(klquant.InvalidInputError, match=r"output `y` must have shape .*a metric can compare it"):
        compare(floats, others, X, engine="onnxruntime")


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        ((FLOAT, OTHER), {"engine": "tensorrt"}, "`engine` must be one of onnxruntime, openvino"),
        ((FLOAT, FLOAT.graph), {}, "`int8_model` must be an onnx.ModelProto or a path"),
        ((FLOAT, build("float[n, 5] z", "float y", "y = MatMul(z, w)", w=W)), {}, "must have the same inputs"),
        ((FLOAT, build("float[n, 5] x", "float z", "z = MatMul(x, w)", w=W)), {}, "must have the same outputs"),
        ((FLOAT, OTHER), {"labels": [1]}, "each of 10 samples, got 1"),
    ],
)
def test_what_does_not_fit_is_refused(models, options, message):
    with pytest.raises(klquant.InvalidInputError, match=message):
        compare(*models, X, **{"engine": "onnxruntime", **options})


def test_a_bad_batch_is_named():
    with pytest.raises(klquant.InvalidInputError, match="batch 1: input `x` must have shape"):
        compare(FLOAT, OTHER, [X[0], X[0].T], engine="onnxruntime")


def test_no_batches_are_refused():
    with pytest.raises(klquant.InvalidInputError, match="at least one batch"):
        compare(FLOAT, OTHER, [], engine="onnxruntime")
