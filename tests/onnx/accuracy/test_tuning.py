import json

import numpy as np
import onnx
import pytest

import klquant
from klquant.backends.onnx import Calibration, compare, inspect, prepare, quantize, tune
from klquant.backends.settings import CRITERIA, WEIGHTED
from support.onnx_models import build

RNG = np.random.default_rng(0)
BODY = """
    a = Conv <pads = [1, 1, 1, 1]> (x, w1)
    s = Sin (a)
    r = Mul (s, scale)
    b = Conv <pads = [1, 1, 1, 1]> (r, w2)
    q = Relu (b)
    c = Conv <pads = [1, 1, 1, 1]> (q, w3)
    y = GlobalAveragePool (c)
"""


def network():
    """Return a model whose second layer is hard to quantize: its input has one channel far larger than the others.

    The weights of that channel are small, so all channels matter alike in its output. Equalization does not see it.
    """
    scale = np.array([300.0, 1, 1, 1], np.float32)
    w2 = RNG.normal(size=(4, 4, 3, 3)) / scale.reshape(1, 4, 1, 1)
    constants = {"w2": w2.astype(np.float32), "scale": scale.reshape(1, 4, 1, 1)}
    return build("float[n, 3, 8, 8] x", "float[n, 4, 1, 1] y", BODY, w1=(4, 3, 3, 3), w3=(4, 4, 3, 3), **constants)


MODEL = network()
X = [RNG.normal(size=(8, 3, 8, 8)).astype(np.float32) for _ in range(8)]


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "tensorrt"])
def test_the_layer_that_costs_most_is_left_out(engine):
    if engine == "openvino":
        pytest.importorskip("openvino")
    found = tune(MODEL, X, engine=engine, target="28dB", min_int8=0.3)
    start, best = found.trace.trials[0].measured, found.trace.best.measured
    assert found.trace.reached
    assert start.sqnr_db < 20
    assert best.sqnr_db >= 28
    assert start.int8_share == 1 > best.int8_share
    assert best.int8_share == pytest.approx(1 - len(found.quantized.skipped) / 3)
    assert "conv3" in found.quantized.skipped
    if engine != "tensorrt":
        held_back = [X[3], X[7]]
        measured = compare(prepare(MODEL).model, found.quantized.model, held_back, engine=engine)
        assert measured.sqnr_db == pytest.approx(best.sqnr_db, abs=0.01)
        nodes = [node for node in inspect(found.quantized.model, engine) if node.op_type in WEIGHTED]
        assert sum(node.int8 for node in nodes) / len(nodes) == pytest.approx(best.int8_share)


def test_the_settings_make_the_model_again(tmp_path):
    found = tune(MODEL, X, engine="onnxruntime", target="28dB", min_int8=0.3)
    found.calibration.save(tmp_path / "calib.npz")
    recipe, calibration = found.trace.best.recipe, Calibration.load(tmp_path / "calib.npz")
    assert recipe.steps == ("refine",)
    options = {"exclude": recipe.exclude, "min_int8": 0.3, "batches": [X[k] for k in (0, 1, 2, 4, 5, 6)]}
    again = quantize(MODEL, calibration, engine="onnxruntime", **options)
    assert again.model == found.quantized.model
    criteria = {one.replaced or one.criterion for one in calibration.thresholds.values()}
    assert criteria <= set(CRITERIA) if recipe.criterion == "auto" else criteria == {recipe.criterion}
    found.quantized.save(tmp_path / "int8.onnx")
    assert onnx.load(tmp_path / "int8.onnx") == found.quantized.model
    assert "<td" in found._repr_html_()


def test_a_target_that_is_out_of_reach_gives_the_best_of_all():
    found = tune(MODEL, X, engine="onnxruntime", target="200dB", max_runs=6)
    assert not found.trace.reached
    values = [trial.measured.sqnr_db for trial in found.trace.trials]
    assert found.trace.best.measured.sqnr_db == max(values) >= values[0]


def test_a_metric_of_the_user_decides():
    seen = []

    def metric(floats, others):
        seen.append((len(floats), len(others)))
        return len(seen) / 10

    found = tune(MODEL, X[:4], engine="onnxruntime", target=0.2, metric=metric, validation=X[4:6])
    assert seen == [(2, 2)] * 2
    assert [trial.measured.metric for trial in found.trace.trials] == [0.1, 0.2]


def test_it_resumes(tmp_path):
    path = tmp_path / "trials.json"
    options = {"engine": "onnxruntime", "target": "28dB", "min_int8": 0.3, "resume": path}
    tune(MODEL, X, **options, max_runs=2)
    first = json.loads(path.read_text())["trials"]
    whole = tune(MODEL, X, **options)
    assert len(first) == 2
    assert json.loads(whole.trace.as_json())["trials"][:2] == first
    again = tune(MODEL, X, **options)
    assert again.trace == whole.trace
    assert again.quantized.model == whole.quantized.model
    for model, batches in ((build("float[n, 3, 8, 8] x", "float y", "y = Relu(x)"), X), (MODEL, X[:7])):
        with pytest.raises(klquant.InvalidInputError, match="must come from a tuning of this model, data and options"):
            tune(model, batches, **options)


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        (X, {"engine": "tensorrtx"}, "`engine` must be one of"),
        (X, {"target": "high"}, "`target` must be"),
        (X, {"max_runs": 0}, "`max_runs`"),
        (X, {"num_bin": 3}, "num_bin"),
        (iter(X), {}, "can be iterated twice"),
        (X, {"validation": []}, "at least one batch to measure on"),
        (X, {"validation": [X[0].T]}, "validation batch 0: input `x`"),
    ],
)
def test_what_is_impossible_is_refused(batches, options, message):
    with pytest.raises(klquant.InvalidInputError, match=message):
        tune(MODEL, batches, **{"engine": "onnxruntime", **options})
