import hashlib
import logging
import sys
import warnings

import numpy as np
import onnx
import pytest
import torch

import klquant
from klquant.backends import torch as torch_backend
from klquant.backends.onnx import Calibration, calibrate, prepare
from klquant.backends.onnx.model.fingerprint import fingerprint
from klquant.backends.onnx.session import OnnxObserver
from klquant.errors import CalibrationWarning, InvalidInputError
from support import digits_networks, onnx_networks
from support.onnx_models import build, run_all

RNG = np.random.default_rng(3)
X = RNG.normal(size=(40, 4)).astype(np.float32)


def small(**changed):
    weights = {"w": np.eye(4, dtype=np.float32), "v": RNG.normal(size=(4, 3)).astype(np.float32), **changed}
    return build("float[n, 4] x", "float y", "a = MatMul(x, w) r = Relu(a) y = MatMul(r, v)", **weights)


SMALL = small()


def quietly(model, batches, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # KL clips some tensors hard
        return calibrate(model, batches, **options)


@pytest.fixture(scope="module")
def vgg():
    return quietly(onnx_networks.load("VGG"), onnx_networks.digits()[0])


def assert_same(a, b):
    assert a.amax == b.amax
    assert repr(a.thresholds) == repr(b.thresholds)  # NaN and all
    assert a.histograms.keys() == b.histograms.keys()
    assert all(a.histograms[name].hist.tobytes() == b.histograms[name].hist.tobytes() for name in a.histograms)


# --- what is found ---


def test_every_tensor_gets_a_range_a_histogram_and_a_threshold():
    found = calibrate(SMALL, [X[:30], X[30:]], criterion="max", num_bins=301)
    tensors = {"x": X, **run_all(SMALL, x=X)}
    assert list(found.amax) == list(found.histograms) == list(found.thresholds) == ["x", "r", "y"]
    for name, layer in found.thresholds.items():
        assert layer.threshold == layer.amax == found.amax[name] == pytest.approx(abs(tensors[name]).max(), rel=1e-6)
        assert found.histograms[name].hist.sum() == tensors[name].size
    assert found.settings.num_bins == 301
    assert found.num_batches == 2
    assert found.calls == {"x": 1, "r": 1, "y": 1}
    assert (found.skipped, found.transforms) == ({}, {})


def test_thresholds_are_those_of_the_search(vgg):
    hist = vgg.histograms["relu_1"].hist.copy()
    hist[len(hist) // 2] = 0
    expected = klquant.optimal_threshold(hist, vgg.histograms["relu_1"].edges)
    assert vgg.thresholds["relu_1"].threshold == expected.value
    assert vgg.thresholds["relu_1"].criterion == "entropy"


@pytest.mark.parametrize(("name", "max_bins"), [("VGG", 1), ("residual net", 20)])
def test_thresholds_are_those_of_the_torch_backend(name, max_bins):
    """What enters each layer is one tensor; kernels that round differently move a count in 3,000, or a flat minimum."""
    model, (batches, *_) = onnx_networks.load(name), onnx_networks.digits()
    ours = quietly(model, batches)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        theirs = torch_backend.quantize(digits_networks.load(name), [torch.from_numpy(batch) for batch in batches])
    names = {
        node.input[1].removesuffix(".weight"): node.input[0]
        for node in prepare(model).graph.nodes
        if node.op_type in ("Conv", "Gemm")
    }
    assert names.keys() == theirs.thresholds.keys()
    for layer, tensor in names.items():
        a, b = ours.thresholds[tensor], theirs.thresholds[layer]
        assert a.amax == pytest.approx(b.amax, rel=1e-6)
        assert abs(a.threshold - b.threshold) <= (max_bins + 0.01) * 2 * a.amax / 4001
        assert a.divergence == pytest.approx(b.divergence, abs=1e-4)
        counts, others = ours.histograms[tensor].hist, theirs.histograms[layer].hist
        assert counts.sum() == others.sum()
        assert abs(counts - others).sum() <= 1e-3 * counts.sum()


def test_results_do_not_depend_on_split_or_order_of_the_data(vgg):
    images = np.concatenate(onnx_networks.digits()[0])
    ragged = np.split(images[::-1], [1, 100, 200])
    assert_same(quietly(onnx_networks.load("VGG"), ragged), vgg)


def test_a_prepared_model_and_a_file_give_the_same(vgg, tmp_path):
    model, batches = onnx_networks.load("VGG"), onnx_networks.digits()[0]
    onnx.save(model, tmp_path / "model.onnx")
    for same in (prepare(model), tmp_path / "model.onnx"):
        found = quietly(same, batches)
        assert_same(found, vgg)
        assert found.model == vgg.model


def test_the_model_is_not_changed():
    before = hashlib.sha256(SMALL.SerializeToString()).digest()
    calibrate(SMALL, [X], criterion="max")
    assert hashlib.sha256(SMALL.SerializeToString()).digest() == before


@pytest.mark.parametrize("wrap", [lambda x: {"x": x}, lambda x: (x,), lambda x: [x], torch.from_numpy])
def test_batches_come_in_any_form(wrap):
    assert_same(calibrate(SMALL, [wrap(X)], criterion="max"), calibrate(SMALL, [X], criterion="max"))


def test_data_may_be_a_loader_that_shuffles():
    loader = torch.utils.data.DataLoader(torch.from_numpy(X), batch_size=7, shuffle=True)
    found = calibrate(SMALL, loader, criterion="max")
    assert found.num_batches == 6
    assert_same(found, calibrate(SMALL, [X], criterion="max"))


# --- settings ---


def test_excluded_tensors_are_not_observed():
    found = calibrate(SMALL, [X], criterion="max", exclude=["y*"])
    assert list(found.amax) == list(found.thresholds) == ["x", "r"]
    assert found.skipped == {"y": "excluded by the settings"}
    only = calibrate(SMALL, [X], criterion="max", include="r")
    assert list(only.amax) == ["r"]
    assert list(only.skipped) == ["x", "y"]


def test_overrides_go_by_the_name_of_the_tensor():
    found = calibrate(SMALL, [X], criterion="max", overrides={"r": {"threshold": 0.5}, "y": {"num_bits": 4}})
    assert (found.thresholds["r"].threshold, found.thresholds["r"].criterion) == (0.5, "fixed")
    assert [layer.num_bits for layer in found.thresholds.values()] == [8, 8, 4]


@pytest.mark.parametrize("criterion", ["max", "entropy", "mse", "percentile"])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_cap_clips_and_says_how_much_and_hides_no_range(criterion, passes):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = calibrate(SMALL, [X], criterion=criterion, max_amax=1.5, passes=passes)
    largest, beyond = float(np.abs(X).max()), (np.abs(X) > 1.5).mean()
    layer = found.thresholds["x"]
    assert (found.amax["x"], layer.amax) == (largest, largest)
    assert layer.threshold <= 1.5 * (1 + 1e-2 * (passes == 1))
    assert layer.clipped >= beyond * 0.99
    message = next(str(one.message) for one in caught if "`x`" in str(one.message))
    assert f"amax = {largest:.4g} exceeds max_amax = 1.5: {beyond:.2%} of its values lie beyond" in message


def test_without_a_cap_any_range_is_observed():
    found = calibrate(SMALL, [1e9 * X], criterion="max")
    assert found.amax["x"] == found.thresholds["x"].threshold == float(np.abs(1e9 * X).max())


@pytest.mark.parametrize("criterion", ["entropy", "percentile", "mse"])
@pytest.mark.parametrize("outlier", [1e4, -1e8])
def test_an_outlier_does_not_hide_the_other_values(criterion, outlier):
    """One value of 10,000 among normal ones: all the others would be in the centre bin."""
    rng = np.random.default_rng(3)  # the same in any order of the tests
    data = [rng.normal(size=(16000, 4)).astype(np.float32) for _ in range(3)]
    clean = quietly(SMALL, data, criterion=criterion).thresholds["x"]
    data[1][7, 1] = outlier
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = calibrate(SMALL, data, criterion=criterion)
    assert any("`x`: 1 of its values are outliers beyond" in str(one.message) for one in caught)
    assert found.thresholds["x"].threshold == pytest.approx(clean.threshold, rel=0.6)
    assert found.thresholds["x"].amax == abs(outlier)


def test_one_pass_warns_of_an_outlier_that_hides_the_other_values():
    data = [RNG.normal(size=(4000, 4)).astype(np.float32) for _ in range(3)]
    data[1][7, 1] = 1e5
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calibrate(SMALL, iter(data), passes=1)
    assert any("`x`: 100.0% of its non-zero values are in the centre bin" in str(one.message) for one in caught)


def test_a_tensor_that_is_always_zero_is_warned_of():
    with pytest.warns(CalibrationWarning, match="`r`: all its values are 0; it gets scale 1"):
        found = calibrate(small(w=-np.eye(4, dtype=np.float32)), [abs(X)], criterion="max", exclude="y")
    assert found.thresholds["r"].threshold == 127


# --- saved ---


def test_a_file_holds_all_of_it(vgg, tmp_path):
    vgg.save(tmp_path / "calibration.npz")
    loaded = Calibration.load(tmp_path / "calibration.npz")
    assert_same(loaded, vgg)
    empty = {"histograms": {}, "thresholds": {}, "versions": {}}
    assert loaded._replace(**empty) == vgg._replace(**empty)


@pytest.mark.parametrize("criterion", ["max", "percentile", "mse"])
def test_another_criterion_needs_no_data(vgg, criterion):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        found = vgg.search_thresholds(criterion=criterion)
    expected = quietly(onnx_networks.load("VGG"), onnx_networks.digits()[0], criterion=criterion).thresholds
    assert repr(found) == repr(expected)  # NaN and all


def test_fingerprints_differ_between_models():
    found = calibrate(SMALL, [X], criterion="max")
    assert found.model.keys() == {"a", "y"}
    assert found.model["y"].kind == "MatMul((4, 3) float)"
    found.check_fits(fingerprint(prepare(SMALL).graph))
    with pytest.raises(InvalidInputError, match="`y` has other weights"):
        found.check_fits(fingerprint(prepare(small(v=np.ones((4, 3), np.float32))).graph))
    with pytest.raises(InvalidInputError, match=r"`y` is MatMul\(\(4, 5\) float\), was calibrated as"):
        found.check_fits(fingerprint(prepare(small(v=np.ones((4, 5), np.float32))).graph))


def test_a_fingerprint_has_all_weights_of_a_node():
    body = "y = Conv(x, w, b)"
    models = [
        prepare(build("float[n, 2, 4, 4] x", "float y", body, w=(3, 2, 1, 1), b=np.full(3, bias, np.float32)))
        for bias in (1, 2)
    ]
    first, second = (fingerprint(model.graph)["y"] for model in models)
    assert first.kind == second.kind == "Conv((3, 2, 1, 1) float, (3,) float)"
    assert first.digest != second.digest


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "kl"}, "`criterion` must be one of entropy, max, percentile, mse"),
        ({"passes": 3}, "`passes` must be 1 or 2, got 3"),
        ({"observe": "outputs"}, "`observe` has no meaning for ONNX models"),
        ({"overrides": {"x": {"observe": "inputs"}}}, "`observe` has no meaning for ONNX models"),
        ({"num_bins": 300}, "`num_bins` must be odd"),
        ({"bins": 301}, r"settings must be among .*, got \['bins'\]"),
        ({"exclude": "z*"}, r"pattern `z\*` matches none of 3"),
        ({"exclude": "*"}, "expected tensors that may be quantized, got none; 3 are excluded"),
        ({"providers": ["TPU"]}, "`providers` must be among .*, got 'TPU'"),
    ],
)
def test_options_are_checked_before_the_data_are_touched(options, message):
    class Untouched:
        def __iter__(self):
            raise AssertionError

    with pytest.raises(InvalidInputError, match=message):
        calibrate(SMALL, Untouched(), **options)


@pytest.mark.parametrize("make", [lambda: (x for x in [X]), lambda: iter([X])])
def test_one_shot_data_are_refused(make):
    with pytest.raises(InvalidInputError, match="`batches` must be an iterable that can be iterated twice, got the"):
        calibrate(SMALL, make())


def test_one_pass_takes_a_one_shot_stream_and_finds_the_same_ranges_and_counts():
    """Bins are others, so thresholds are nearly the same; counts of any split and order are the same bit for bit."""
    expected = calibrate(SMALL, [X[:30], X[30:]], criterion="max")
    one = calibrate(SMALL, iter([X[30:], X[:3], X[3:30]]), criterion="max", passes=1)
    assert (one.amax, one.ranges, one.num_batches) == (expected.amax, expected.ranges, 3)
    assert_same(one, calibrate(SMALL, [X], criterion="max", passes=1))
    for name, found in one.histograms.items():
        assert found.hist.sum() == expected.histograms[name].hist.sum()
        assert expected.amax[name] <= found.edges[-1] < expected.amax[name] * 1.001


class Runs:
    """Data that break off before batch `fail_at` of all passes together, and count what they gave."""

    def __init__(self, fail_at=None):
        self.given, self.fail_at = 0, fail_at

    def __iter__(self):
        for k in range(4):
            if self.given == self.fail_at:
                raise LookupError
            self.given += 1
            yield X[10 * k : 10 * k + 10]


@pytest.mark.parametrize(("passes", "fail_at"), [(1, 0), (1, 3), (2, 2), (2, 6)])
def test_a_calibration_resumes_where_it_was_cut_off(tmp_path, passes, fail_at):
    options = {"criterion": "mse", "passes": passes, "num_bins": 301, "keep_bytes": 0}
    with pytest.raises(LookupError):
        calibrate(SMALL, Runs(fail_at), resume=tmp_path / "p.npz", **options)
    kept = (tmp_path / "p.npz").read_bytes()
    with pytest.raises(InvalidInputError, match="must be a checkpoint of this model with these settings"):
        calibrate(small(w=2 * np.eye(4, dtype=np.float32)), Runs(), resume=tmp_path / "p.npz", **options)
    assert (tmp_path / "p.npz").read_bytes() == kept
    got = calibrate(SMALL, Runs(), resume=tmp_path / "p.npz", **options)
    assert_same(got, calibrate(SMALL, Runs(), **options))


def test_resuming_runs_no_batch_twice(tmp_path, monkeypatch):
    ran = []
    observe = OnnxObserver.observe
    monkeypatch.setattr(OnnxObserver, "observe", lambda self, *args: ran.append(args[-1]) or observe(self, *args))
    with pytest.raises(LookupError):
        calibrate(SMALL, Runs(6), criterion="max", resume=tmp_path / "p.npz", checkpoint_seconds=1e9, keep_bytes=0)
    calibrate(SMALL, Runs(), criterion="max", resume=tmp_path / "p.npz", keep_bytes=0)
    assert ran == [0, 1, 2, 3, 0, 1, 2, 3]


def test_smallest_and_largest_values_are_kept(tmp_path):
    found = quietly(SMALL, [X[:30], X[30:]], criterion="max", max_amax=1.0)
    tensors = {"x": X, **run_all(SMALL, x=X)}
    for name, (low, high) in found.ranges.items():
        assert (low, high) == pytest.approx((tensors[name].min(), tensors[name].max()), rel=1e-6)
    assert found.amax["x"] == max(map(abs, found.ranges["x"]))
    found.save(tmp_path / "c.npz")
    loaded = Calibration.load(tmp_path / "c.npz")
    assert (loaded.ranges, loaded.zeros, loaded.beyond) == (found.ranges, found.zeros, found.beyond)
    assert found.beyond["x"] == (np.abs(X) > 1).sum()
    assert found.zeros["r"] == (tensors["r"] == 0).sum()


def test_no_data_is_refused():
    with pytest.raises(InvalidInputError, match="expected at least one calibration batch, got none"):
        calibrate(SMALL, [])


@pytest.mark.parametrize("second", [[X], [X, X, X]])
def test_another_number_of_batches_in_pass_2_is_refused(second):
    passes = iter([[X, X], second])

    class Batches:
        def __iter__(self):
            return iter(next(passes))

    with pytest.raises(InvalidInputError, match=f"expected the 2 batches of pass 1, got {len(second)} in pass 2"):
        calibrate(SMALL, Batches(), criterion="max", keep_bytes=0)


def test_a_model_with_nothing_to_quantize_is_refused():
    with pytest.raises(InvalidInputError, match="expected tensors that may be quantized, got none; 0 are excluded"):
        calibrate(build("int64[n] x", "int64 y", "y = Neg(x)"), [np.arange(3)])


# --- log and progress ---


def test_the_passes_are_logged(caplog):
    with caplog.at_level(logging.INFO, logger="klquant"):
        calibrate(SMALL, [X, X], criterion="max")
    assert caplog.messages == ["pass 1: the ranges of 3 tensors in 2 batches", "pass 2: 3 histograms"]


@pytest.mark.parametrize("shown", [True, False])
def test_progress_is_shown_on_a_terminal_if_asked_for(monkeypatch, shown):
    written = []
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "write", lambda text: written.append(text) or len(text))
    monkeypatch.setenv("TERM", "xterm")
    calibrate(SMALL, [X, X], criterion="max", progress=shown)
    for text in ("pass 1: ranges", "pass 2: histograms", "100%"):
        assert (text in "".join(written)) == shown


def test_progress_is_silent_off_a_terminal(capfd):
    calibrate(SMALL, [X], criterion="max", progress=True)
    assert capfd.readouterr() == ("", "")
