import numpy as np
import pytest

import klquant
from klquant.backends.onnx import calibrate, prepare, quantize
from klquant.backends.onnx.accuracy.sensitivity import quantizer_costs
from klquant.backends.onnx.correction.adaround import adapt_rounding
from klquant.backends.onnx.placement import Ranges, find_ranges
from klquant.backends.onnx.qdq.insertion import write_qdq
from klquant.backends.onnx.refinement import corrected_choice, layer_choice
from klquant.backends.onnx.refinement.corrected_choice import best_corrected
from klquant.backends.onnx.refinement.layer_choice import CLIPPING, COSTLY, _Refinement, refined
from klquant.backends.onnx.refinement.noise_search import open_meter
from klquant.backends.onnx.refinement.place import Place, Refined
from klquant.backends.onnx.refinement.range_choices import Base
from klquant.backends.onnx.refinement.work import Work
from support.onnx_models import build, run

LAYERS = 8
CHAIN = " ".join(
    f"a{k} = Conv <pads = [1, 1, 1, 1]> ({f'r{k - 1}' if k else 'x'}, w{k}) r{k} = Relu (a{k})" for k in range(LAYERS)
)
BODY = f"{CHAIN} p = GlobalAveragePool (r{LAYERS - 1}) f = Flatten (p) y = Gemm (f, w)"
NOTHING = Work({}, (), 0)
OPTIONS = {"int_bias": False, "reduce_range": False}
BAD = 4
"""The layer whose output has one channel far above the others, which the next layer scales down again."""


def network(bad=((BAD, 200),)):
    """Return a network with tensors that INT8 rounds badly, between layers that are harmless."""
    rng = np.random.default_rng(1)
    weights = {f"w{k}": rng.normal(size=(8, 8, 3, 3), scale=0.17).astype(np.float32) for k in range(LAYERS)}
    for layer, factor in bad:
        weights[f"w{layer}"][0] *= factor
        weights[f"w{layer + 1}"][:, 0] /= factor
    return build("float[n, 8, 10, 10] x", "float[n, 5] y", BODY, **weights, w=(8, 5))


@pytest.fixture(autouse=True)
def unscaled(monkeypatch):
    """Leave the channels alone: scaling them would mend what is bad here."""
    monkeypatch.setattr(layer_choice, "SCALED", 0.0)


def batches(seed, number=4):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(4, 8, 10, 10)).astype(np.float32) for _ in range(number)]


@pytest.fixture(scope="module")
def case():
    prepared = prepare(network())
    return prepared, calibrate(prepared, batches(0), criterion="max")


def sqnr_db(prepared, quantized):
    x = np.concatenate(batches(1))
    floats, found = (run(model, x=x)["y"] for model in (prepared.model, quantized))
    return 10 * np.log10((floats**2).sum() / ((floats - found) ** 2).sum())


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "tensorrt"])
def test_the_layers_around_a_bad_tensor_are_left_out(case, engine):
    prepared, calibration = case
    options = {"engine": engine, "batches": batches(0), "correct_bias": False}
    plain = quantize(prepared, calibration, min_int8=1.0, **options)
    refined = quantize(prepared, calibration, min_int8=0.7, **options)
    left_out = {name for name, why in refined.skipped.items() if why == COSTLY}
    convolutions = [node.name for node in prepared.graph.nodes if node.op_type == "Conv"]
    assert not plain.skipped
    assert convolutions[BAD + 1] in left_out
    assert len(left_out) <= 2
    assert sqnr_db(prepared, refined.model) > sqnr_db(prepared, plain.model) + 6


def test_silence_at_the_begin_of_a_recording_does_not_decide(case):
    prepared, calibration = case
    quiet = [batch * np.float32(1e-6) for batch in batches(0)] + batches(0, 8)
    found = quantize(prepared, calibration, engine="openvino", batches=quiet, correct_bias=False, min_int8=0.7)
    assert found.skipped


def test_what_the_worst_layer_hid_is_left_out_too():
    prepared = prepare(network([(1, 600), (5, 15)]))
    calibration = calibrate(prepared, batches(0), criterion="max")
    options = {"engine": "openvino", "batches": batches(0), "correct_bias": False}
    found = quantize(prepared, calibration, min_int8=0.5, **options)
    convolutions = [node.name for node in prepared.graph.nodes if node.op_type == "Conv"]
    assert found.skipped.keys() >= {convolutions[2], convolutions[6]}


def test_the_last_way_is_taken_only_where_it_is_better(case):
    prepared, calibration = case
    good = find_ranges(prepared, calibration, "openvino", asymmetric=False)
    bad = Ranges({name: 3 * threshold for name, threshold in good.thresholds.items()}, {})
    where = Place(prepared, "openvino", (), lambda placed: write_qdq(*placed.prepared, *placed[1:3], **OPTIONS))
    ways = [Refined(Base(prepared, [ranges]), ranges) for ranges in (good, bad)]
    for tried in (ways, ways[::-1]):
        assert best_corrected(where, tried, batches(0), None).refined.ranges is good
        assert best_corrected(where, tried, batches(0), False).refined.ranges is good
    assert best_corrected(where, ways[1:], batches(0), True).corrections


@pytest.mark.parametrize(("error", "left_out", "taken"), [(0.9, (), 1), (0.9, ("c1",), 0), (0.84, ("c1",), 1)])
def test_a_layer_in_floating_point_must_be_worth_its_time(case, monkeypatch, error, left_out, taken):
    prepared, calibration = case
    ranges = find_ranges(prepared, calibration, "openvino", asymmetric=False)
    where = Place(prepared, "openvino", (), lambda placed: write_qdq(*placed.prepared, *placed[1:3], **OPTIONS))
    start = Refined(Base(prepared, [ranges]), ranges)
    tried = [start, start._replace(left_out=left_out)]
    monkeypatch.setattr(corrected_choice, "output_errors", lambda *_, **__: [1.0, error])
    assert best_corrected(where, tried, batches(0), False).refined is tried[taken]


def test_enough_of_the_layers_and_of_their_work_stays_in_int8(case):
    prepared, calibration = case
    found = quantize(prepared, calibration, engine="onnxruntime", batches=batches(0), min_int8=0.95)
    assert not found.skipped


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_0_to_1_is_refused(case, share):
    prepared, calibration = case
    with pytest.raises(klquant.InvalidInputError, match="`min_int8` must be between 0 and 1"):
        quantize(prepared, calibration, min_int8=share)


def test_without_batches_nothing_is_left_out(case):
    prepared, calibration = case
    assert not quantize(prepared, calibration, engine="onnxruntime").skipped


def test_ranges_that_clip_what_the_outputs_need_become_wider():
    body = "a = Conv <pads = [1, 1, 1, 1]> (x, w1) r = Relu (a) y = Conv (r, w2)"
    prepared = prepare(build("float[n, 4, 9, 9] x", "float[n, 4, 9, 9] y", body, w1=(4, 4, 3, 3), w2=(4, 4, 1, 1)))
    data = [np.random.default_rng(seed).normal(size=(4, 4, 9, 9)).astype(np.float32) for seed in range(4)]
    calibration = calibrate(prepared, data)
    good = find_ranges(prepared, calibration, "openvino", asymmetric=False)
    bad = Ranges(good.thresholds | {"r": 0.2 * good.thresholds["r"]}, {})
    where = Place(prepared, "openvino", (), lambda placed: write_qdq(*placed.prepared, *placed[1:3], **OPTIONS))
    *_, found = refined(where, bad, calibration, data, 1.0)
    assert found.ranges.thresholds["r"] == calibration.amax["r"]
    assert not found.left_out
    unguarded = {
        name: layer._replace(threshold=bad.thresholds[name], guarded=False)
        for name, layer in calibration.thresholds.items()
    }
    literal = calibration._replace(thresholds=unguarded)
    assert refined(where, bad, literal, data, 1.0)[-1].ranges.thresholds == bad.thresholds


def test_tensors_that_only_the_lowered_model_has_keep_their_ranges():
    body = "a = Conv (x, w1) r = PRelu (a, s) y = Conv (r, w2)"
    slopes = np.array([-6, -4, -2, -1], np.float32).reshape(4, 1, 1)
    model = build("float[n, 4, 9, 9] x", "float[n, 4, 9, 9] y", body, w1=(4, 4, 1, 1), w2=(4, 4, 1, 1), s=slopes)
    feeds = [{"x": np.random.default_rng(seed).normal(size=(4, 4, 9, 9)).astype(np.float32)} for seed in range(4)]
    prepared = prepare(model)
    good = find_ranges(prepared, calibrate(prepared, feeds), "onnxruntime", asymmetric=False)
    bad = Ranges(good.thresholds | {"a": 0.1 * good.thresholds["a"]}, {})
    where = Place(prepared, "onnxruntime", (), lambda placed: write_qdq(*placed.prepared, *placed[1:3], **OPTIONS))
    start, refinement = Refined(Base(prepared, [bad, good]), bad), _Refinement(where, feeds, feeds, 1.0, NOTHING)
    costs, _ = refinement._costs(start)
    _, found = refinement._measured(start)
    assert costs["r_negative"] > 0.02
    assert found.thresholds == good.thresholds


@pytest.mark.parametrize(("part", "clips"), [(0.999 / CLIPPING, True), (1.001 / CLIPPING, False)])
def test_a_range_clips_only_if_that_spares_enough_noise(case, monkeypatch, part, clips):
    prepared, calibration = case
    narrow = find_ranges(prepared, calibration, "openvino", asymmetric=False)
    wide = Ranges({name: 2 * threshold for name, threshold in narrow.thresholds.items()}, {})

    def costs(self, chosen, unit=None):
        return dict.fromkeys(narrow.thresholds, part if chosen.ranges is narrow else 1.0), [1.0, 1.0]

    monkeypatch.setattr(_Refinement, "_costs", costs)
    start = Refined(Base(prepared, [narrow, wide]), narrow)
    _, found = _Refinement(None, [], [], 1.0, NOTHING)._measured(start)
    assert found == (narrow if clips else wide)


def test_the_search_finds_the_quantizer_that_costs_most(case):
    prepared, calibration = case
    quantized = quantize(prepared, calibration, engine="openvino").model
    feeds = [{"x": batches(3, 1)[0]}]
    exact = quantizer_costs(prepared.graph, quantized, feeds)
    with open_meter(prepared.graph, quantized, feeds) as meter:
        found = meter.costs(max_runs=24)
    assert found.keys() == exact.keys()
    assert max(found, key=found.__getitem__) == max(exact, key=exact.__getitem__)
    assert sum(found.values()) == pytest.approx(1, abs=0.5)


@pytest.mark.parametrize("spoilt", [True, False])
def test_weights_are_rounded_to_nearest_if_the_outputs_say_so(case, monkeypatch, spoilt):
    prepared, calibration = case

    def rounded(*args):
        found = adapt_rounding(*args)
        return {name: -one for name, one in found.items()} if spoilt else found

    monkeypatch.setattr(corrected_choice, "adapt_rounding", rounded)
    options = {"engine": "openvino", "batches": batches(0), "min_int8": 1}
    found, nearest = (quantize(prepared, calibration, adaround=one, **options) for one in (None, False))
    weights = [{one.name: one.raw_data for one in each.model.graph.initializer} for each in (found, nearest)]
    same = [weights[0][name] == weights[1][name] for name in weights[0] if name.endswith("_quantized")]
    assert all(same) == spoilt
    always = quantize(prepared, calibration, adaround=True, **options).model
    assert (always == found.model) != spoilt
