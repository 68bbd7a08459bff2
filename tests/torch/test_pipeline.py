"""Whole calibrations: choices for single layers, one pass, and a saved calibration used again without data."""

import copy
import warnings

import pytest
import torch
from torch import nn

import klquant
from klquant.backends.torch import Calibration, LayerOptions, Quantizer, Stage, fake_quantize, quantize, requantize
from klquant.backends.torch.simulation import QuantizedLayer, quantize_weights
from klquant.errors import CalibrationWarning, InvalidInputError, StageError
from support.networks import Net, batch, is_same, mlp, outputs, ready

pytestmark = pytest.mark.filterwarnings("ignore:layer `[^`]*`. (T =|expected SQNR):klquant.errors.CalibrationWarning")
DATA = [batch(40, 4, seed=k, dtype=torch.float32) for k in range(3)]
OPTIONS = {"num_bins": 401}


def sqnr_db(got, expected):
    return float(10 * torch.log10(expected.square().sum() / (got - expected).square().sum()))


# Choices for single layers


def test_excluded_layers_stay_in_floating_point_without_a_warning():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = quantize(mlp(), DATA, exclude="second", **OPTIONS)
    assert not [w for w in caught if "floating point" in str(w.message)]
    assert list(result.thresholds) == list(result.histograms) == list(result.weight_scales) == ["first"]
    assert result.skipped == {"second": "excluded by the settings"}
    assert type(result.model.second) is nn.Linear
    assert is_same(result.model.second.weight.detach(), mlp().second.weight.detach())


def test_only_included_layers_are_quantized():
    assert list(quantize(mlp(), DATA, include="sec*", **OPTIONS).thresholds) == ["second"]


def test_a_misspelt_pattern_is_refused_with_the_names_that_are_there():
    with pytest.raises(InvalidInputError, match=r"pattern `secondd` matches none of 2 layers, such as \['second'"):
        quantize(mlp(), DATA, exclude="secondd", **OPTIONS)


def test_criterion_bits_and_threshold_may_differ_from_layer_to_layer():
    overrides = {"first": {"criterion": "max", "num_bits": 4}, "second": LayerOptions(threshold=0.5)}
    result = quantize(mlp(), DATA, overrides=overrides, **OPTIONS)
    first, second = result.thresholds["first"], result.thresholds["second"]
    assert (first.criterion, first.num_bits, first.threshold) == ("max", 4, first.amax)
    assert (second.criterion, second.num_bits, second.threshold) == ("fixed", 8, 0.5)
    entering = torch.cat([outputs(mlp()[:-1] if isinstance(mlp(), nn.Sequential) else hidden, x) for x in DATA])
    assert second.clipped == pytest.approx(float((entering > 0.5).double().mean()), abs=0.01)
    assert result.weight_scales["first"].tolist() == (folded().first.weight.abs().amax(1) / 7).tolist()
    layer = result.model.first
    assert len(layer.layer.layer.weight[0].unique()) <= 15
    assert float(layer.scale) == pytest.approx(first.amax / 7)


def hidden(x):
    model = folded()
    return model.relu(model.first(x))


def folded():
    quantizer = Quantizer(mlp())
    quantizer.fold(DATA[0])
    return quantizer._folded


def test_the_number_of_bits_sets_the_levels_of_activations_and_weights():
    expected = outputs(mlp(), DATA[0])
    found = {bits: quantize(mlp(), DATA, num_bits=bits, criterion="mse", **OPTIONS) for bits in (3, 4, 6, 8)}
    noise = [sqnr_db(outputs(result.model, DATA[0]), expected) for result in found.values()]
    assert noise == sorted(noise)
    assert noise[-1] - noise[0] > 20
    assert {result.thresholds["first"].num_bits for result in found.values()} == {3, 4, 6, 8}


def test_where_a_layer_is_observed_may_differ_from_layer_to_layer():
    result = quantize(mlp(), DATA, overrides={"second": {"observe": "outputs"}}, **OPTIONS)
    inputs, outs = quantize(mlp(), DATA, **OPTIONS), quantize(mlp(), DATA, observe="outputs", **OPTIONS)
    assert result.thresholds["first"] == inputs.thresholds["first"]
    assert result.thresholds["second"] == outs.thresholds["second"]
    assert (result.model.first.observe, result.model.second.observe) == ("inputs", "outputs")


def test_more_levels_than_bins_are_refused_by_layer():
    with pytest.raises(InvalidInputError, match=r"layer `first`: `hist` must have at least num_quantized_bins = 1023"):
        quantize(mlp(), DATA, overrides={"first": {"num_bits": 10}}, **OPTIONS)


def test_a_floor_and_a_percentile_reach_the_search():
    floor = quantize(mlp(), DATA, overrides={"*": {"min_ratio": 0.95}}, **OPTIONS).thresholds
    assert all(found.threshold >= 0.95 * found.amax for found in floor.values())
    few = quantize(mlp(), DATA, criterion="percentile", overrides={"*": {"percentile": 50}}, **OPTIONS).thresholds
    assert few["first"].clipped == pytest.approx(0.5, abs=0.01)


# Copies


@pytest.fixture
def copies(monkeypatch):
    """Count the deep copies of modules."""
    found, deepcopy = [], copy.deepcopy

    def counting(value, memo=None, *rest):
        if memo is None and isinstance(value, nn.Module):
            found.append(value)
        return deepcopy(value, memo, *rest)

    monkeypatch.setattr(copy, "deepcopy", counting)
    return found


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ({}, 1),
        ({"equalize": True}, 1),
        ({"correct_bias": True}, 2),  # the rounded weights and those before rounding are needed together
        ({"criterion": "auto"}, 2),  # here as well; this copy is gone when the other is made
        ({"equalize": True, "correct_bias": True, "criterion": "auto"}, 3),
    ],
)
def test_the_model_is_copied_once_or_where_both_forms_are_needed_once_more(options, number, copies):
    calibration = quantize(mlp(), DATA, **options, **OPTIONS).calibration
    assert len(copies) == number
    copies.clear()
    requantize(mlp(), calibration)
    assert len(copies) == 1


@pytest.mark.parametrize("change", [lambda x: x.mul_(2), lambda x: x.zero_()])
def test_a_result_does_not_depend_on_a_quantizer_that_goes_on_nor_the_quantizer_on_it(change):
    def changed(model):
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                change(tensor)

    quantizer = Quantizer.from_calibration(mlp(), quantize(mlp(), DATA, **OPTIONS).calibration)
    first, second = quantizer.simulate(), quantizer.simulate()
    expected = outputs(first.model, DATA[0])
    assert is_same(outputs(second.model, DATA[0]), expected)
    changed(second.model)
    quantizer.search_thresholds(criterion="max")
    quantizer.equalize(DATA[0])
    assert is_same(outputs(first.model, DATA[0]), expected)
    assert is_same(outputs(requantize(mlp(), first.calibration).model, DATA[0]), expected)
    third = Quantizer.from_calibration(mlp(), first.calibration).simulate()
    changed(quantizer._folded)
    assert is_same(outputs(third.model, DATA[0]), expected)


def test_a_corrected_model_is_another_one():
    quantizer = Quantizer.from_calibration(mlp(), quantize(mlp(), DATA, **OPTIONS).calibration)
    plain = quantizer.simulate()
    expected = outputs(plain.model, DATA[0])
    corrected = quantizer.correct_bias(plain, DATA)
    assert is_same(outputs(plain.model, DATA[0]), expected)
    assert not is_same(outputs(corrected.model, DATA[0]), expected)


def test_every_run_that_decides_starts_from_the_buffers_of_the_model():
    """A model with a state is folded as if it had none, and pass 1 sees the state that the user gave it."""

    def run(net, x):
        net.state += 1
        return net.second(net.relu(net.norm(net.first(x)))) + net.state

    model = mlp()
    model.run = run
    model.register_buffer("state", torch.zeros(3))
    result = quantize(model, DATA, equalize=True, keep_bytes=0, **OPTIONS)
    assert [(fold.kind, fold.reason) for fold in result.folds] == [("batch_norm", ""), ("relu", "")]
    assert result.model.state.tolist() == [2 * len(DATA)] * 3
    assert model.state.tolist() == [0] * 3


# Choice by the data


def test_auto_takes_for_each_layer_one_of_the_criteria_and_is_no_worse_than_any():
    options = {**OPTIONS, "guard": False}
    results = {c: quantize(mlp(), DATA, criterion=c, **options) for c in ("auto", "entropy", "max", "mse")}
    auto = results["auto"].thresholds
    assert {found.criterion for found in auto.values()} <= {"entropy", "max", "mse", "percentile"}
    for name, found in auto.items():
        if found.criterion in results:
            assert repr(found) == repr(results[found.criterion].thresholds[name])
    expected = outputs(mlp(), torch.cat(DATA))
    quality = {c: sqnr_db(outputs(r.model, torch.cat(DATA)), expected) for c, r in results.items()}
    assert quality["auto"] > quality["entropy"] + 3  # which clips these few values hard


def test_auto_leaves_choices_for_single_layers_alone():
    result = quantize(mlp(), DATA, criterion="auto", overrides={"second": {"criterion": "max"}}, **OPTIONS)
    assert result.thresholds["second"].criterion == "max"
    assert result.thresholds["first"].criterion != "entropy"


def test_auto_needs_data():
    quantizer = Quantizer.from_calibration(mlp(), quantize(mlp(), DATA, **OPTIONS).calibration)
    with pytest.raises(InvalidInputError, match="criterion='auto' needs `batches`, got none"):
        quantizer.search_thresholds(criterion="auto")
    assert quantizer.stage is Stage.CALIBRATED


# One pass


def test_one_pass_takes_a_one_shot_stream_and_finds_nearly_the_same():
    data = [batch(4000, 4, seed=k, dtype=torch.float32) for k in range(3)]
    one = quantize(mlp(), iter(data), passes=1)
    two = quantize(mlp(), data)
    assert one.calibration.amax == two.calibration.amax
    for name, found in two.thresholds.items():
        assert one.thresholds[name].threshold == pytest.approx(found.threshold, rel=0.1)
        assert one.thresholds[name].sqnr_db == pytest.approx(found.sqnr_db, abs=1)
        assert one.histograms[name].hist.sum() == two.histograms[name].hist.sum()
        assert len(one.histograms[name].hist) >= 4001 / 3
    assert one.calibration.num_batches == 3
    for found in quantize(mlp(), iter(data), passes=1, criterion="max").thresholds.values():
        assert found.threshold == found.amax  # not the edge of the last bin, which lies beyond


def test_what_one_pass_cannot_do_is_refused():
    for options in ({"criterion": "auto"}, {"correct_bias": True}):
        with pytest.raises(InvalidInputError, match="twice, got the one-shot list_iterator"):
            quantize(mlp(), iter(DATA), passes=1, **options)
    quantizer = Quantizer(mlp(), passes=1)
    quantizer.fold(DATA[0])
    with pytest.raises(StageError, match=r"call quantize_weights\(\) first"):
        quantizer.collect_histograms(DATA)
    quantizer.quantize_weights()
    with pytest.raises(InvalidInputError, match=r"needs passes=2, got passes=1; call collect_histograms\(batches\)"):
        quantizer.collect_amax(DATA)


# A saved calibration


@pytest.mark.parametrize(
    "options", [{}, {"observe": "outputs"}, {"equalize": True}, {"passes": 1}, {"exclude": "first"}]
)
@pytest.mark.parametrize("criterion", ["entropy", "auto"])
def test_a_saved_calibration_gives_the_same_model_without_data(tmp_path, options, criterion):
    result = quantize(mlp(), DATA, criterion=criterion, **options, **OPTIONS)
    result.calibration.save(tmp_path / "c.npz")
    again = requantize(mlp(), Calibration.load(tmp_path / "c.npz"))
    assert is_same(outputs(again.model, DATA[0]), outputs(result.model, DATA[0]))
    assert repr(again.thresholds) == repr(result.thresholds)
    assert again.folds == result.folds
    assert (again.skipped, again.calibration.transforms) == (result.skipped, result.calibration.transforms)


@pytest.mark.parametrize("change", [{"criterion": "mse"}, {"num_bits": 4}, {"criterion": "max", "num_bits": 5}])
def test_another_choice_from_a_saved_calibration_is_that_of_the_data(change):
    calibration = quantize(mlp(), DATA, **OPTIONS).calibration
    again = requantize(mlp(), calibration, **change)
    criterion = {"criterion": change.get("criterion", "entropy")}
    expected = quantize(mlp(), DATA, **{**OPTIONS, **change, **criterion})
    assert repr(again.thresholds) == repr(expected.thresholds)
    assert is_same(outputs(again.model, DATA[0]), outputs(expected.model, DATA[0]))
    assert again.calibration.settings.num_bits == change.get("num_bits", 8)


def test_the_path_of_a_calibration_is_none():
    with pytest.raises(InvalidInputError, match=r"expected a Calibration, got str; Calibration\.load\(path\)"):
        requantize(mlp(), "calib.npz")


def test_a_calibration_of_another_model_is_refused_by_layer():
    calibration = quantize(mlp(), DATA, **OPTIONS).calibration
    other = mlp()
    other.first.weight.data[0, 0] += 1
    other.second = nn.Linear(6, 2).eval()
    with pytest.raises(InvalidInputError, match=r"2 differing layers: `first` has other weights; `second` is Linear\("):
        requantize(other, calibration)
    with pytest.raises(
        InvalidInputError, match=r"`first` is Linear\(weight \(6, 4\) float64, bias \(6,\) float64\), was"
    ):
        requantize(mlp(torch.float64), calibration)


def test_statistics_are_the_same_for_a_model_after_a_round_trip_of_its_weights():
    model = mlp()
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()})
    model.norm.num_batches_tracked += 5  # counts training steps: no part of the function
    assert requantize(model, quantize(mlp(), DATA, **OPTIONS).calibration).thresholds


# Counts and warnings


def test_the_calls_of_a_loop_are_counted_and_joined():
    def loop(net, x):
        for _ in range(20):
            x = net.fc(x)
        return x

    calibration = quantize(Net(loop, fc=nn.Linear(4, 4)).eval(), DATA, **OPTIONS).calibration
    assert calibration.calls == {"fc": 20}
    assert calibration.histograms["fc"].hist.sum() == 20 * sum(x.numel() for x in DATA)


def test_layers_that_stay_in_floating_point_are_named_once_for_each_reason():
    table, table2, fc, idle = nn.Embedding(5, 4), nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    run = lambda net, x: net.fc(net.a(x) + net.b(x))  # noqa: E731
    model = Net(run, a=table, b=table2, fc=fc, idle=idle).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = quantize(model, [torch.arange(5)], **OPTIONS)
    messages = [str(w.message) for w in caught if "stay" in str(w.message)]
    assert messages == [
        "layers `a`, `b` stay in floating point: the table of an embedding is not quantized",
        "layer `idle` stays in floating point: it was never called",
    ]
    assert set(result.skipped) == {"a", "b", "idle"}


def test_hard_clipping_is_named_with_what_to_do():
    data = torch.cat([batch(20000, 4, dtype=torch.float32), torch.full((20, 4), 40.0)])
    with pytest.warns(
        CalibrationWarning,
        match=r"layer `0`: .*; to take the better criterion pass overrides={'0': {'criterion': '(mse|max)'}}",
    ):
        quantize(nn.Sequential(nn.Linear(4, 4)).eval(), [data], guard=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(nn.Sequential(nn.Linear(4, 4)).eval(), [data], criterion="mse")
        quantize(nn.Sequential(nn.Linear(4, 4)).eval(), [data])


def test_requantize_keeps_what_the_guard_found_and_undoes_it_on_demand():
    guarded = quantize(mlp(), DATA, **OPTIONS).calibration
    with pytest.warns(CalibrationWarning):
        literal = quantize(mlp(), DATA, **OPTIONS, guard=False).calibration
    assert any(found.replaced == "entropy" for found in guarded.thresholds.values())
    assert not any(found.replaced for found in literal.thresholds.values())
    assert repr(requantize(mlp(), guarded).thresholds) == repr(guarded.thresholds)
    assert repr(requantize(mlp(), guarded, criterion="entropy").thresholds) == repr(guarded.thresholds)
    with pytest.warns(CalibrationWarning):
        undone = requantize(mlp(), guarded, guard=False)
    assert repr(undone.thresholds) == repr(literal.thresholds)
    assert undone.calibration.settings == literal.settings
    with pytest.warns(CalibrationWarning):  # the literal algorithm is saved with the calibration
        assert repr(requantize(mlp(), literal, criterion="entropy").thresholds) == repr(literal.thresholds)


def test_a_warning_points_at_a_line_of_the_caller():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4)).eval()
    with pytest.warns(CalibrationWarning, match="embedding") as caught:
        quantize(model, [torch.arange(5)], **OPTIONS)
    assert caught[-1].filename == __file__


# Optional stages


def test_equalization_is_exact_in_floating_point_and_helps_unequal_channels():
    model = ready(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), dtype=torch.float32)
    factors = 2.0 ** torch.tensor([-6.0, -3, 0, 2, 4, 6])
    model[0].weight.data *= factors[:, None]
    model[0].bias.data *= factors
    model[2].weight.data /= factors
    quantizer = Quantizer(model, **OPTIONS)
    quantizer.fold(DATA[0])
    entries = quantizer.equalize(DATA[0])
    assert entries[0][:3] == ("0", "2", "")
    assert is_same(outputs(quantizer._folded, DATA[0]), outputs(model, DATA[0]))
    expected = outputs(model, DATA[0])
    plain, equal = (quantize(model, DATA, criterion="mse", equalize=e, **OPTIONS).model for e in (False, True))
    assert sqnr_db(outputs(equal, DATA[0]), expected) > sqnr_db(outputs(plain, DATA[0]), expected) + 10


def test_bias_correction_takes_away_the_mean_error():
    data = [batch(500, 4, seed=k, dtype=torch.float32) for k in range(3)]
    model = ready(nn.Sequential(nn.Linear(4, 3)), dtype=torch.float32)
    plain, corrected = (quantize(model, data, num_bits=4, correct_bias=c, criterion="max").model for c in (False, True))
    errors = [outputs(m, torch.cat(data)) - outputs(model, torch.cat(data)) for m in (plain, corrected)]
    assert errors[1].mean(0).abs().max() < 1e-6 < errors[0].mean(0).abs().max()


def test_a_quantizer_diagnoses_its_model():
    quantizer = Quantizer.from_calibration(mlp(), quantize(mlp(), DATA, **OPTIONS).calibration)
    found = quantizer.diagnose(DATA)
    assert {layer.name for layer in found.layers} == {"first", "second"}
    expected = sqnr_db(outputs(quantizer.simulate().model, torch.cat(DATA)), outputs(mlp(), torch.cat(DATA)))
    assert found.model_sqnr_db == pytest.approx(expected, abs=0.01)


def test_simulated_layers_know_their_bits():
    result = quantize(mlp(), DATA, num_bits=5, **OPTIONS)
    assert all(m.num_bits == 5 for m in result.model.modules() if isinstance(m, QuantizedLayer))
    scales = quantize_weights(folded(), num_bits={"first": 5})
    assert list(scales) == ["first"]


@pytest.mark.parametrize("num_bits", [2, 4, 8, 12])
def test_fewer_bits_are_those_of_the_core(num_bits):
    x, levels = 100 * DATA[0], 2**num_bits - 1
    expected = klquant.fake_quantize(x.numpy(), 0.5, num_quantized_bins=levels)
    assert fake_quantize(x, torch.tensor(0.5), num_bits=num_bits).tolist() == expected.tolist()
