import numpy as np
import pytest

import klquant
from klquant.backends.onnx import Calibration, calibrate, prepare
from klquant.backends.onnx.accuracy import criterion_choice
from klquant.backends.onnx.accuracy.criterion_choice import (
    best_of,
    choose_criterion,
    measuring_model,
    rounding_model,
)
from klquant.backends.thresholds import LayerThreshold, candidate_thresholds
from support.onnx_models import build, run

RNG = np.random.default_rng(0)
W, V = (RNG.normal(size=shape).astype(np.float32) for shape in ((5, 4), (4, 3)))
MODEL = prepare(build("float[n, 5] x", "float[n, 3] y", "a = MatMul(x, w) r = Relu(a) f = Flatten(r) y = MatMul(f, v)",
                      w=W, v=V))  # fmt: skip
X = RNG.standard_t(3, size=(64, 5)).astype(np.float32)


def at(value, bits=8):
    return LayerThreshold(value, value, np.nan, 0.0, num_bits=bits)


def rounded(x, layer):
    return klquant.fake_quantize(x, layer.scale, num_quantized_bins=2**layer.num_bits - 1)


@pytest.mark.parametrize("bits", [8, 4])
def test_errors_are_those_behind_the_readers(bits):
    """Of x behind the product and the rectifier, of r behind the move and the second product; of y itself."""
    narrow = {name: at(1.0, bits) for name in ("x", "r", "y")}
    wide = {name: at(8.0, bits) for name in ("x", "r", "y")}
    found = choose_criterion(MODEL, {"mse": narrow, "max": wide}, [{"x": X[:40]}, {"x": X[40:]}])
    r = np.maximum(X @ W, 0)
    behind = {"x": lambda x: np.maximum(x @ W, 0), "r": lambda r: r @ V, "y": lambda y: y}
    for name, value in (("x", X), ("r", r), ("y", r @ V)):
        expected = behind[name](value)
        for criterion, layers in (("mse", narrow), ("max", wide)):
            noise = ((behind[name](rounded(value, layers[name])) - expected) ** 2).sum() / (expected**2).sum()
            assert found[name].errors[criterion] == pytest.approx(noise, rel=0.02)  # engines round to -128 too
        assert found[name].criterion == min(found[name].errors, key=found[name].errors.__getitem__)


def test_errors_of_several_readers_add_up():
    model = prepare(build("float[n, 5] x", "float y, float z", "y = MatMul(x, w) z = Mul(x, c)", w=W, c=np.float32(3)))
    (choice,) = choose_criterion(model, {"mse": {"x": at(1.0)}}, [{"x": X}]).values()
    other = rounded(X, at(1.0))
    shares = [((other @ W - X @ W) ** 2).sum() / ((X @ W) ** 2).sum(), ((other - X) ** 2).sum() / (X**2).sum()]
    assert choice.errors["mse"] == pytest.approx(sum(shares), rel=0.02)


def test_the_model_that_measures_computes_the_same_as_before():
    model, _ = measuring_model(MODEL, {"mse": {"x": at(1.0)}})
    np.testing.assert_array_equal(run(model, x=X)["y"], run(MODEL.model, x=X)["y"])


def test_the_model_that_rounds_rounds_every_tensor():
    thresholds = {name: at(3.0) for name in ("x", "r")}
    expected = rounded(np.maximum(rounded(X, at(3.0)) @ W, 0), at(3.0)) @ V
    np.testing.assert_allclose(run(rounding_model(MODEL, thresholds), x=X)["y"], expected, atol=0.1)
    np.testing.assert_array_equal(run(rounding_model(MODEL, {}), x=X)["y"], run(MODEL.model, x=X)["y"])


def test_the_outputs_of_the_model_have_the_last_word():
    assignments = {"a": {"x": at(0.5)}, "b": {"x": at(20.0)}, "c": {"x": at(5.0)}}
    noise = {
        key: ((run(rounding_model(MODEL, found), x=X)["y"] - run(MODEL.model, x=X)["y"]) ** 2).sum()
        for key, found in assignments.items()
    }
    assert best_of(MODEL, assignments, [{"x": X}]) == min(noise, key=noise.__getitem__)


def test_auto_gives_ordinary_thresholds(tmp_path):
    found = calibrate(MODEL, [X], criterion="auto")
    options = found.settings.resolve(found.amax)
    candidates = candidate_thresholds(found.amax, found.histograms, options, found.hidden)
    for name, layer in found.thresholds.items():
        assert layer == pytest.approx(candidates[layer.criterion][name], nan_ok=True) or layer.criterion == "none"
    found.save(tmp_path / "calib.npz")
    loaded = Calibration.load(tmp_path / "calib.npz").thresholds
    assert {name: one.threshold for name, one in loaded.items()} == {
        name: one.threshold for name, one in found.thresholds.items()
    }


def test_the_choice_is_mixed_or_one_for_all(monkeypatch):
    choices = iter([criterion_choice.MIXED, "percentile"])
    monkeypatch.setattr(criterion_choice, "best_of", lambda *given: next(choices))
    mixed, one = (calibrate(MODEL, [X], criterion="auto").thresholds for _ in range(2))
    assert {one[name].criterion for name in ("x", "r")} == {"percentile"}
    assert {mixed[name].criterion for name in ("x", "r")} != {"percentile"}


@pytest.mark.filterwarnings("ignore:layer `x`. expected SQNR")
def test_overrides_keep_their_criterion():
    found = calibrate(MODEL, [X], criterion="auto", overrides={"x": {"criterion": "entropy"}, "r": {"threshold": 2.5}},
                      guard=False)  # fmt: skip
    assert found.thresholds["x"].criterion == "entropy"
    assert found.thresholds["r"].threshold == 2.5


def test_auto_reads_eight_samples(monkeypatch):
    seen = []
    original = criterion_choice.choose_criterion

    def choosing(prepared, candidates, feeds, **options):
        seen.extend(len(feed["x"]) for feed in feeds)
        return original(prepared, candidates, feeds, **options)

    monkeypatch.setattr(criterion_choice, "choose_criterion", choosing)
    calibrate(MODEL, [X[:5], X[5:]], criterion="auto")
    assert seen == [5, 3]


def test_auto_needs_data_that_can_be_iterated_again():
    with pytest.raises(klquant.InvalidInputError, match="can be iterated twice"):
        calibrate(MODEL, iter([X]), criterion="auto", passes=1)
