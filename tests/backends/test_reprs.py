"""Results are printed in one line, and errors that list choices list them all and name the nearest."""

import numpy as np
import pytest
import torch
from torch import nn

import klquant
from klquant.backends import onnx as onnx_backend
from klquant.backends import torch as torch_backend
from klquant.backends.settings import CRITERIA, Settings, check_choice, check_engine
from klquant.errors import ArrayTypeError, InvalidInputError
from support.onnx_models import build

MODEL = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
X = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(4)]
ONNX = build("float[n, 3, 8, 8] x", "float[n, 4, 6, 6] y", "a = Conv (x, w) y = Relu (a)", w=(4, 3, 3, 3))
FEEDS = [batch.numpy() for batch in X]


@pytest.fixture(scope="module")
def results():
    """Every kind of result, by the start of its line."""
    quantizer = torch_backend.Quantizer(MODEL)
    folds = quantizer.fold(X[0])
    quantizer.quantize_weights()
    quantizer.collect_amax(X)
    quantizer.collect_histograms(X)
    thresholds = quantizer.search_thresholds()
    quantized = quantizer.simulate()
    calibration = onnx_backend.calibrate(ONNX, FEEDS)
    qdq = onnx_backend.quantize(ONNX, calibration, engine="onnxruntime", batches=FEEDS)
    tuned = onnx_backend.tune(ONNX, FEEDS, engine="onnxruntime", target="1dB")
    return {
        "QuantizedModel(Sequential, 2 layers in INT8 (": quantized,
        "Calibration(2 tensors, 4 batches, ": calibration,
        "Calibration(0 tensors, 0 batches, no thresholds yet": torch_backend.Calibration.of(Settings()),
        "LayerThreshold(threshold=": next(iter(thresholds.values())),
        "Fold(batch_norm 1, into 0)": folds[0],
        "Examination(2 of 2 modules can be folded": torch_backend.examine(MODEL, X[0]),
        "Diagnosis(2 layers, output ": quantizer.diagnose(X),
        "Prepared(2 nodes, x -> y)": onnx_backend.prepare(ONNX),
        "QDQModel(2 activations in INT8": qdq,
        "Verification(onnxruntime: ": qdq.verification,
        "Sensitivity(3 quantizers, ": onnx_backend.sensitivity(ONNX, calibration, FEEDS, engine="onnxruntime"),
        "Trace(target 1dB reached": tuned.trace,
        "Tuned(target 1dB reached": tuned,
    }


def test_every_result_is_one_line(results):
    for start, result in results.items():
        text = repr(result)
        assert text.startswith(start)
        assert len(text) < 250
        assert "\n" not in text


def test_every_result_is_a_table_in_notebooks(results):
    for start, result in results.items():
        if not start.startswith(("Fold(", "LayerThreshold(", "Prepared(")):
            assert result._repr_html_().startswith("<table>"), start


def test_a_histogram_is_a_table_in_notebooks():
    found = klquant.histogram(np.array([-2.0, 0.0, 0.0, 1.0]), num_bins=5)
    cells = "<tr><td>5</td><td>2</td><td>4</td><td>2</td></tr>"
    assert cells in found._repr_html_()
    many = klquant.histogram(np.ones((40, 3)), num_bins=5, axis=0)
    assert many._repr_html_().count("<tr>") == 32
    assert "... 10 more" in many._repr_html_()


def test_a_result_that_is_called_names_its_model(results):
    for name in ("QuantizedModel", "QDQModel"):
        (result,) = (found for start, found in results.items() if start.startswith(name))
        with pytest.raises(ArrayTypeError, match=f"a {name} cannot be called; call its `.model`"):
            result(X[0])


@pytest.mark.parametrize(
    ("given", "hint"),
    [("kl", "; did you mean 'entropy'?"), ("minmax", "; did you mean 'max'?"), ("MinMax", "; did you mean 'max'?"),
     ("percentil", "; did you mean 'percentile'?"), ("other", ""), (3, "")],
)  # fmt: skip
def test_the_nearest_choice_is_named(given, hint):
    with pytest.raises(InvalidInputError) as caught:
        check_choice("criterion", given, CRITERIA)
    assert str(caught.value) == f"`criterion` must be one of entropy, max, percentile, mse, got {given!r}{hint}"


def test_all_choices_are_listed_where_a_user_meets_them():
    with pytest.raises(
        InvalidInputError, match="entropy, max, percentile, mse, auto, got 'kl'; did you mean 'entropy'"
    ):
        torch_backend.quantize(MODEL, X, criterion="kl")
    with pytest.raises(InvalidInputError, match="entropy, max, percentile, mse, auto, got 'amax'; did you mean 'max'"):
        onnx_backend.calibrate(ONNX, FEEDS, criterion="amax")
    with pytest.raises(InvalidInputError, match="got 'trt'; did you mean 'tensorrt'"):
        check_engine("trt")
    with pytest.raises(InvalidInputError, match=r"got \['num_bin'\]; did you mean 'num_bins'"):
        Settings.make(num_bin=255)
    with pytest.raises(InvalidInputError, match=r"`criterion` of `fc` must be one of .* did you mean 'entropy'"):
        Settings.make(overrides={"fc": {"criterion": "kl"}})
    with pytest.raises(InvalidInputError, match=r"got \['criterium'\]; did you mean 'criterion'"):
        Settings.make(overrides={"fc": {"criterium": "max"}})
