"""``auto`` on ONNX models: what it returns is what its parts return, measured on data that was held back."""

import numpy as np
import onnx
import pytest

from klquant.backends.onnx import auto, calibrate, compare, prepare, quantize
from klquant.backends.onnx.accuracy.comparison import RunnableModel
from klquant.backends.onnx.accuracy.criterion_choice import auto_thresholds
from klquant.errors import InvalidInputError
from support.onnx_models import build

RNG = np.random.default_rng(0)
MODEL = build("float[n, 3, 8, 8] x", "float[n, 4] y",
              "a = Conv <pads = [1, 1, 1, 1]> (x, w1) r = Relu (a) c = Conv (r, w2) p = GlobalAveragePool (c) "
              "y = Flatten (p)", w1=(4, 3, 3, 3), w2=(4, 4, 3, 3))  # fmt: skip
X = [RNG.normal(size=(8, 3, 8, 8)).astype(np.float32) for _ in range(8)]
KEPT, HELD = [X[k] for k in (0, 1, 2, 4, 5, 6)], [X[3], X[7]]


@pytest.fixture(scope="module")
def found():
    return auto(MODEL, X, engine="onnxruntime", target="10dB")


def test_all_criteria_and_steps_are_tried(found):
    names = [one.what for one in found.attempts]
    assert names[:5] == ["entropy", "max", "percentile", "mse", "auto"]
    assert [name.rpartition(" + ")[2] for name in names[5:]] == ["equalize", "smooth", "correct_bias"]
    assert found.reached
    assert found.left_out == ()


def test_numbers_are_those_of_the_data_that_was_held_back(found):
    measured = compare(MODEL, found.quantized.model, HELD, engine="onnxruntime")
    assert found.best.sqnr_db == pytest.approx(measured.sqnr_db, abs=0.01)
    assert found.best.agreement == pytest.approx(measured.agreement)
    assert found.best.num_bytes == RunnableModel.of("model", found.quantized.model).size
    assert found.data == (6, 16, True)
    assert found.best.sqnr_db >= max(one.sqnr_db for one in found.attempts) - 0.2


def test_a_criterion_alone_gives_what_calibrate_and_quantize_give(found):
    calibration = calibrate(MODEL, KEPT, criterion="max")
    model = quantize(MODEL, calibration, engine="onnxruntime").model
    expected = compare(MODEL, model, HELD, engine="onnxruntime").sqnr_db
    assert found.attempts[1].sqnr_db == pytest.approx(expected, abs=0.01)


def test_the_result_is_verified_on_its_engine(found):
    assert found.verification.ran == "onnxruntime"
    assert found.verification.wrong == []


def test_the_choice_of_criteria_is_made_once(monkeypatch):
    chosen = []

    def counted(prepared, *arguments):
        chosen.append(prepared.model.SerializeToString())
        return auto_thresholds(prepared, *arguments)

    monkeypatch.setattr("klquant.backends.onnx.automatic._Ways.criteria", ("auto",))
    monkeypatch.setattr("klquant.backends.onnx.automatic.auto_thresholds", counted)
    assert auto(MODEL, X, engine="onnxruntime", target="10dB").best.recipe.criterion == "auto"
    assert len(chosen) == len(set(chosen))


def test_for_tensorrt_nothing_is_timed():
    found = auto(MODEL, X, engine="tensorrt", target="10dB", max_seconds=0.001)
    assert np.isnan(found.best.ms)
    assert "ms" not in found.verdict
    assert found.left_out[0] == "max"
    assert "TensorRT was not run" in str(found.verification)


def test_a_metric_and_other_data_to_measure_on():
    options = {"metric": lambda floats, others: len(floats) / 10, "validation": X[:3], "max_seconds": 0.001}
    found = auto(MODEL, X, engine="onnxruntime", target=0.3, **options)
    assert (found.best.agreement, found.measure, found.data) == (0.3, "metric", (8, 24, True))


def test_few_batches_serve_both_purposes_and_the_verdict_says_so():
    found = auto(MODEL, X[:2], engine="onnxruntime", max_seconds=0.001)
    assert not found.data.held_out
    assert "of the calibration itself" in found.verdict


def test_a_file_counts_with_its_size(tmp_path):
    onnx.save(MODEL, tmp_path / "model.onnx")
    found = auto(tmp_path / "model.onnx", X, engine="onnxruntime", max_seconds=0.001)
    assert found.float_bytes == (tmp_path / "model.onnx").stat().st_size


@pytest.mark.parametrize(
    ("options", "message"),
    [({"engine": "tflite"}, "`engine` must be one of"), ({"target": "30 apples"}, "`target` must be"),
     ({"validation": []}, "at least one batch to measure on"), ({"max_seconds": 0}, "`max_seconds`")],
)  # fmt: skip
def test_impossible_arguments_are_refused(options, message):
    with pytest.raises(InvalidInputError, match=message):
        auto(MODEL, X, **{"engine": "onnxruntime", **options})


class Reader:
    def __init__(self):
        self.rewind()

    def rewind(self):
        self.batches = iter({"x": batch} for batch in X)

    def get_next(self):
        return next(self.batches, None)


def test_a_reader_of_onnxruntime_is_split_like_a_list(monkeypatch):
    monkeypatch.setattr("klquant.backends.onnx.automatic._Ways.criteria", ("max",))
    monkeypatch.setattr("klquant.backends.onnx.automatic._Ways.steps", ())
    read, given = (auto(MODEL, data, engine="tensorrt") for data in (Reader(), X))
    assert read.data == given.data == (6, 16, True)
    assert read.best.sqnr_db == given.best.sqnr_db


def test_sizes_of_minus_one_are_free():
    """PaddlePaddle writes them; `prepare` and `compare` must read the file alike."""
    model = onnx.ModelProto.FromString(MODEL.SerializeToString())
    for dim in model.graph.input[0].type.tensor_type.shape.dim[::2]:
        dim.dim_value = -1
    assert compare(model, prepare(MODEL).model, HELD, engine="onnxruntime").agreement == 1
