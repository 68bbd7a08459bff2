import logging
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from klquant.backends.torch import (
    Quantizer,
    Stage,
    collect_amax,
    collect_histograms,
    fold_batch_norm,
    fold_relu,
    quantize,
    quantize_weights,
    search_thresholds,
    simulate,
)
from klquant.backends.torch.simulation import QuantizedLayer
from klquant.errors import CalibrationWarning, InvalidInputError, ModelError, StageError
from support.networks import Broken, Net, batch, fingerprint, is_same, mlp, outputs

# a few hundred values are clipped hard by the entropy criterion, and a warning says so
pytestmark = pytest.mark.filterwarnings("ignore:layer `.*`. (T =|expected SQNR):klquant.errors.CalibrationWarning")
DATA = [batch(40, 4, seed=k, dtype=torch.float32) for k in range(3)]
OPTIONS = {"num_bins": 401}
STAGES = [
    (Stage.FOLDED, "fold", lambda q: q.fold(DATA[0])),
    (Stage.WEIGHTS_QUANTIZED, "quantize_weights", lambda q: q.quantize_weights()),
    (Stage.AMAX_COLLECTED, "collect_amax", lambda q: q.collect_amax(DATA)),
    (Stage.HISTOGRAMS_COLLECTED, "collect_histograms", lambda q: q.collect_histograms(DATA)),
    (Stage.CALIBRATED, "search_thresholds", lambda q: q.search_thresholds()),
    (None, "simulate", lambda q: q.simulate()),
]


def at_stage(stage, model=None, **options):
    quantizer = Quantizer(model or mlp(), **OPTIONS, **options)
    for _, _, call in STAGES[:stage]:
        call(quantizer)
    return quantizer


def assert_same_results(a, b):
    assert a.folds == b.folds
    assert repr(a.thresholds) == repr(b.thresholds)  # NaN is equal to NaN here
    assert a.weight_scales.keys() == b.weight_scales.keys()
    assert all(is_same(a.weight_scales[name], b.weight_scales[name]) for name in a.weight_scales)
    assert a.histograms.keys() == b.histograms.keys()
    assert all(a.histograms[name].hist.tolist() == b.histograms[name].hist.tolist() for name in a.histograms)
    assert is_same(outputs(a.model, DATA[0]), outputs(b.model, DATA[0]))


def relative_error(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def test_stages_are_reached_one_by_one(caplog):
    quantizer = Quantizer(mlp(), **OPTIONS)
    assert quantizer.stage is Stage.LOADED
    with caplog.at_level(logging.INFO, "klquant"):
        for stage, _, call in STAGES[:-1]:
            call(quantizer)
            assert quantizer.stage is stage
    logged = [message.split()[1] for message in caplog.messages if not message.startswith("guard: ")]
    assert logged == [stage.name for stage, _, _ in STAGES[:-1]]
    quantizer.simulate()
    assert quantizer.stage is Stage.CALIBRATED


@pytest.mark.parametrize(("reached", "asked"), [(i, j) for i in range(6) for j in range(i + 1, 6)])
def test_a_stage_before_its_turn_names_the_missing_call(reached, asked):
    quantizer = at_stage(reached)
    _, missing, _ = STAGES[reached]
    with pytest.raises(StageError, match=rf"at stage {Stage(reached).name}; call {missing}\(.*\) first"):
        STAGES[asked][2](quantizer)
    assert quantizer.stage == reached


@pytest.mark.parametrize("repeated", range(5))
def test_repeating_a_stage_discards_the_later_ones(repeated):
    quantizer = at_stage(Stage.CALIBRATED)
    stage, _, call = STAGES[repeated]
    call(quantizer)
    assert quantizer.stage is stage
    for _, _, too_early in STAGES[repeated + 2 :]:
        with pytest.raises(StageError, match=rf"call {STAGES[repeated + 1][1]}\("):
            too_early(quantizer)
    for _, _, call in STAGES[repeated + 1 : -1]:
        call(quantizer)
    assert_same_results(quantizer.simulate(), quantize(mlp(), DATA, **OPTIONS))


def test_a_repeated_stage_replaces_what_it_found():
    quantizer = at_stage(Stage.CALIBRATED)
    doubled = [2 * x for x in DATA]
    quantizer.collect_amax(doubled)
    quantizer.collect_histograms(doubled)
    quantizer.search_thresholds(criterion="max")
    assert_same_results(quantizer.simulate(), quantize(mlp(), doubled, criterion="max", **OPTIONS))


def test_thresholds_may_be_searched_again_with_another_criterion():
    quantizer = at_stage(Stage.CALIBRATED)
    entropy = quantizer.simulate()
    largest = quantizer.search_thresholds(criterion="max")
    assert quantizer.simulate().thresholds == largest
    assert largest != entropy.thresholds
    assert_same_results(entropy, quantize(mlp(), DATA, **OPTIONS))


def test_a_repeated_pass_takes_the_thresholds_out_of_the_calibration():
    quantizer = at_stage(Stage.CALIBRATED)
    assert quantizer.calibration.thresholds
    quantizer.collect_histograms(DATA)
    assert not quantizer.calibration.thresholds


def test_a_failed_stage_leaves_the_earlier_results():
    quantizer = at_stage(Stage.CALIBRATED)
    with pytest.raises(InvalidInputError):
        quantizer.collect_amax([])
    with pytest.raises(InvalidInputError):
        quantizer.search_thresholds(criterion="none")
    assert quantizer.stage is Stage.CALIBRATED
    assert_same_results(quantizer.simulate(), quantize(mlp(), DATA, **OPTIONS))


@pytest.mark.parametrize("observe", ["inputs", "outputs"])
@pytest.mark.parametrize("criterion", ["entropy", "max"])
def test_quantize_is_the_chain_of_the_stages_and_of_the_functions(observe, criterion):
    got = quantize(mlp(), DATA, criterion=criterion, observe=observe, **OPTIONS)
    quantizer = Quantizer(mlp(), observe=observe, **OPTIONS)
    for _, _, call in STAGES[:4]:
        call(quantizer)
    quantizer.search_thresholds(criterion=criterion)
    assert_same_results(quantizer.simulate(), got)

    model, norms = fold_batch_norm(mlp(), DATA[0])
    model, relus = fold_relu(model, DATA[0])
    scales = quantize_weights(model)
    amax = collect_amax(model, DATA, observe=observe)
    histograms = collect_histograms(model, DATA, amax, observe=observe, **OPTIONS)
    thresholds = search_thresholds(amax, histograms, criterion=criterion, hidden=got.calibration.hidden)
    result = simulate(model, scales, thresholds, observe=observe)
    assert_same_results(got._replace(model=result), got)
    assert norms + relus == got.folds
    assert repr(thresholds) == repr(got.thresholds)


def test_each_stage_returns_what_the_result_holds():
    quantizer = Quantizer(mlp(), **OPTIONS)
    folds, scales, amax, histograms, thresholds, result = [call(quantizer) for _, _, call in STAGES]
    assert [(fold.kind, fold.into, fold.reason) for fold in folds] == [
        ("batch_norm", "first", ""),
        ("relu", "first", ""),
    ]
    assert (result.folds, result.thresholds) == (folds, thresholds)
    assert {name: scale.tolist() for name, scale in result.weight_scales.items()} == {
        name: scale.tolist() for name, scale in scales.items()
    }
    assert result.histograms is histograms
    assert {name: found.amax for name, found in thresholds.items()} == amax


def test_the_result_is_close_to_the_model_and_not_the_same():
    result = quantize(mlp(), DATA, **OPTIONS)
    assert 1e-4 < relative_error(outputs(result.model, DATA[0]), outputs(mlp(), DATA[0])) < 0.05
    assert isinstance(result.model.first, QuantizedLayer)
    assert list(result.thresholds) == ["first", "second"]


def test_activations_are_observed_with_the_weights_in_floating_point():
    result = quantize(mlp(), DATA, **OPTIONS)
    model, _ = fold_batch_norm(mlp(), DATA[0])
    entering = outputs(lambda x: F.relu(model.first(x)), torch.cat(DATA))
    assert result.thresholds["second"].amax == pytest.approx(entering.max().item(), rel=1e-6)


@pytest.mark.parametrize("batches", [DATA, tuple(DATA), torch.utils.data.DataLoader(torch.cat(DATA), batch_size=50)])
def test_data_may_be_anything_that_can_be_iterated_twice(batches):
    found = quantize(mlp(), batches, **OPTIONS).thresholds["first"]
    assert found == quantize(mlp(), DATA, **OPTIONS).thresholds["first"]


@pytest.mark.parametrize("once", [lambda: (x for x in DATA), lambda: iter(DATA), lambda: map(torch.clone, DATA)])
def test_what_can_be_iterated_only_once_is_refused_untouched(once):
    batches = once()
    with pytest.raises(InvalidInputError, match=f"twice, got the one-shot {type(batches).__name__}; pass a list or"):
        quantize(mlp(), batches)
    assert len(list(batches)) == 3


def test_an_exhausted_iterator_in_pass_2_is_an_error():
    quantizer = at_stage(Stage.WEIGHTS_QUANTIZED, keep_bytes=0)
    batches = iter(DATA)
    quantizer.collect_amax(batches)
    with pytest.raises(InvalidInputError, match="at least one calibration batch, got none"):
        quantizer.collect_histograms(batches)


def test_no_data_are_an_error():
    with pytest.raises(InvalidInputError, match="at least one calibration batch, got none"):
        quantize(mlp(), [])


def test_all_options_are_checked_at_once():
    with pytest.raises(InvalidInputError, match="`observe` must be 'inputs' or 'outputs', got 'weights'"):
        Quantizer(mlp(), observe="weights")
    with pytest.raises(InvalidInputError, match=r"the model must be in eval mode, got .* call model\.eval\(\)"):
        Quantizer(mlp().train())
    with pytest.raises(InvalidInputError, match=r"must be a torch\.nn\.Module, got str"):
        Quantizer("resnet18")
    with pytest.raises(InvalidInputError, match="`criterion` must be"):
        quantize(mlp(), DATA, criterion="kl", **OPTIONS)


def test_a_model_put_into_training_mode_on_the_way_is_refused():
    model = mlp()
    quantizer = Quantizer(model)
    model.train()
    with pytest.raises(InvalidInputError, match="eval mode"):
        quantizer.fold(DATA[0])


def test_forward_is_used_in_every_stage():
    calls = []

    def forward(model, item):
        calls.append(item["name"])
        return model(item["x"] / 2)

    items = [{"name": k, "x": x} for k, x in enumerate(DATA)]
    got = quantize(mlp(), items, forward=forward, keep_bytes=0, **OPTIONS)
    assert set(calls[:-6]) == {0}  # folding looks at the first batch
    assert calls[-6:] == [0, 1, 2] * 2
    assert_same_results(got, quantize(mlp(), [x / 2 for x in DATA], **OPTIONS))


def test_a_layer_that_is_never_called_stays_in_floating_point():
    model = Net(lambda net, x: net.fc(x), fc=nn.Linear(4, 4), idle=nn.Linear(4, 4)).eval()
    with pytest.warns(CalibrationWarning, match="layer `idle` stays in floating point: it was never called"):
        result = quantize(model, DATA, **OPTIONS)
    assert list(result.thresholds) == ["fc"]
    assert type(result.model.idle) is nn.Linear
    assert is_same(result.model.idle.weight.detach(), model.idle.weight.detach())


def test_a_layer_that_sees_only_zeros_is_named_and_still_runs():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    model[0].weight.data.fill_(1)
    model[0].bias.data.fill_(-1e3)
    with pytest.warns(CalibrationWarning, match="layer `2`: all its values are 0"):
        result = quantize(model, DATA, **OPTIONS)
    assert result.model[2].scale == 1
    assert math.isnan(result.thresholds["2"].divergence)
    torch.testing.assert_close(outputs(result.model, DATA[0]), outputs(model, DATA[0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_other_dtypes_run_through(dtype):
    data = [x.to(dtype) for x in DATA]
    result = quantize(mlp(dtype), data, **OPTIONS)
    got = outputs(result.model, data[0])
    assert got.dtype == dtype
    assert 1e-4 < relative_error(got, outputs(mlp(dtype), data[0])) < 0.05


def test_a_model_with_branches_that_depend_on_the_data_is_calibrated():
    def run(net, x):
        return net.a(x) if x.sum() > 0 else net.b(-x)

    model = Net(run, a=nn.Linear(4, 4), b=nn.Linear(4, 4)).eval()
    result = quantize(model, [DATA[0].abs(), -DATA[1].abs()], **OPTIONS)
    assert {name: found.amax for name, found in result.thresholds.items()} == {
        "a": DATA[0].abs().max(),
        "b": DATA[1].abs().max(),
    }


def failing_data(k):
    class Data:
        def __iter__(self):
            yield from DATA[:k]
            raise Broken

    return Data()


def failing_after(k):
    seen = []

    def forward(model, x):
        model(x)
        seen.append(x)
        if len(seen) > k:
            raise Broken

    return forward


WRONG = {
    "nothing": (lambda: DATA, dict, None),
    "forward at once": (lambda: DATA, lambda: {"forward": failing_after(0)}, ModelError),
    "forward while joining ReLU": (lambda: DATA, lambda: {"forward": failing_after(1)}, ModelError),
    "forward in pass 1": (lambda: DATA, lambda: {"forward": failing_after(3)}, ModelError),
    "forward in pass 2": (lambda: DATA, lambda: {"forward": failing_after(6), "keep_bytes": 0}, ModelError),
    "data at once": (lambda: failing_data(0), dict, Broken),
    "data later": (lambda: failing_data(2), dict, Broken),
    "NaN": (lambda: [DATA[0], DATA[1] * float("nan")], dict, InvalidInputError),
    "wrong shape": (lambda: [DATA[0], DATA[1][:, :3]], dict, ModelError),
}


@pytest.mark.parametrize("observe", ["inputs", "outputs"])
@pytest.mark.parametrize("case", WRONG)
def test_the_users_model_is_as_before_whatever_happens(case, observe):
    data, options, error = WRONG[case]
    model = mlp()
    model.first.bias.requires_grad_(False)
    model.second.register_forward_hook(lambda module, args, output: None)
    expected, before = outputs(model, DATA[0]), fingerprint(model)
    if error is None:
        result = quantize(model, data(), observe=observe, **options(), **OPTIONS)
        assert not ({id(p) for p in result.model.parameters()} & {id(p) for p in model.parameters()})
    else:
        with pytest.raises(error):
            quantize(model, data(), observe=observe, **options(), **OPTIONS)
    assert fingerprint(model) == before
    assert is_same(outputs(model, DATA[0]), expected)
    assert torch.is_grad_enabled()


def test_the_data_are_as_before():
    before = [(x._version, x.clone()) for x in DATA]
    quantize(mlp(), DATA, **OPTIONS)
    assert all(x._version == version and is_same(x, old) for x, (version, old) in zip(DATA, before, strict=True))


# --- found wrong while these tests were written ---


def test_all_calls_of_a_layer_that_a_list_repeats_are_quantized():
    fc, relu = nn.Linear(4, 4), nn.ReLU()
    result = quantize(nn.Sequential(fc, relu, fc, relu).eval(), DATA, **OPTIONS)
    for call in ("0@0", "0@1"):
        assert result.histograms[call].hist.sum() == sum(x.numel() for x in DATA)
    assert isinstance(result.model[2].get_submodule("@1"), QuantizedLayer)


def test_a_layer_whose_weight_is_a_buffer_is_quantized_by_its_function():
    odd = nn.Linear(4, 4)
    del odd.weight
    odd.register_buffer("weight", torch.ones(4, 4))
    result = quantize(nn.Sequential(nn.Linear(4, 4), odd).eval(), DATA, **OPTIONS)
    assert list(result.thresholds) == ["0", "1:linear.0.input"]


def test_attention_is_named_as_left_in_floating_point():
    model = Net(lambda net, x: net.attend(x, x, x)[0], attend=nn.MultiheadAttention(4, 2, add_bias_kv=True)).eval()
    with pytest.warns(CalibrationWarning, match="layer `attend` stays in floating point: the projections"):
        quantize(model, DATA, **OPTIONS)


def test_a_relu_that_follows_only_in_one_branch_is_refused_or_not_joined():
    model = Net(lambda net, x: F.relu(net.fc(x)) if x.sum() > 0 else net.fc(x), fc=nn.Linear(4, 4)).eval()
    data = [DATA[0].abs(), -DATA[1].abs()]
    assert outputs(model, data[1]).min() < -0.5
    with pytest.raises(
        InvalidInputError, match="layer `fc`: expected that its output only goes to the ReLU that is folded"
    ):
        quantize(model, data, **OPTIONS)
    assert outputs(quantize(model, data[::-1], **OPTIONS).model, data[1]).min() < -0.5


def test_a_model_that_changes_its_input_in_place_is_calibrated_on_the_data_as_given():
    model = Net(lambda net, x: net.fc(x.div_(2)), fc=nn.Linear(4, 4)).eval()
    expected = torch.cat(DATA).abs().max().item() / 2
    assert quantize(model, [x.clone() for x in DATA], **OPTIONS).thresholds["fc"].amax == expected


def test_a_model_of_which_nothing_is_quantized_is_reported():
    inner = nn.Sequential(nn.Linear(4, 4)).eval()
    model = Net(lambda net, x: inner(x), inner=inner).eval()  # a closure escapes the copy
    with pytest.warns(CalibrationWarning):
        quantize(model, DATA, **OPTIONS)


def test_an_even_number_of_bins_is_refused_before_the_data_are_run():
    with pytest.raises(InvalidInputError, match="num_bins"):
        Quantizer(mlp(), num_bins=400)
