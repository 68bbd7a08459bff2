import io
import json
import math
import sys
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from klquant.backends import batches as progress
from klquant.backends.torch import LayerThreshold, fold_relu, quantize_weights
from klquant.backends.torch.accuracy.diagnosis import Diagnosis, LayerDiagnosis, diagnose
from klquant.backends.torch.accuracy.measurement import Measurements
from klquant.backends.torch.model.layers import weighted_layers
from klquant.errors import InvalidInputError
from support.networks import Broken, Net, batch, fingerprint, num_hooks, outputs, ready

X = batch(40, 4)
NUMBERS = LayerDiagnosis._fields[1:-1]


def clipping(value):
    return LayerThreshold(value, value, math.nan, 0.0)


def amax_thresholds(model, *args, observe="inputs"):
    """Return thresholds at the largest value that each layer sees or gives."""
    found, handles = {}, []
    for name, layer in weighted_layers(model):

        def hook(module, given, output, name=name):
            largest = float((given[0] if observe == "inputs" else output).abs().max())
            found[name] = max(found.get(name, 0.0), largest)

        handles.append(layer.register_forward_hook(hook))
    outputs(model, *args)
    for handle in handles:
        handle.remove()
    return {name: clipping(value) for name, value in found.items()}


def diagnosed(model, batches, thresholds=None, **options):
    if thresholds is None:
        thresholds = amax_thresholds(model, torch.cat(batches), observe=options.get("observe", "inputs"))
    return diagnose(model, quantize_weights(model), thresholds, batches, **options)


def by_name(diagnosis):
    return {layer.name: layer for layer in diagnosis.layers}


def chain(width=4, depth=3, seed=0):
    """Return linear layers `0`, `2`, ... with tanh between them."""
    parts = [part for _ in range(depth) for part in (nn.Linear(width, width), nn.Tanh())]
    return ready(nn.Sequential(*parts[:-1]), seed=seed)


# --- the numbers, by NumPy ---


def rounded(x, scale):
    scale = np.asarray(scale, np.float32).astype(np.float64)
    return np.clip(np.rint(x / scale), -127, 127) * scale


def sqnr(x, y):
    return 10 * np.log10((x**2).sum() / ((x - y) ** 2).sum())


def cosine(x, y):
    return (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)


class Mlp:
    """Linear, ReLU, Linear with either layer in INT8 or not."""

    def __init__(self, model, thresholds, observe):
        self.layers = [model[0], model[2]]
        self.thresholds = [thresholds[name].threshold for name in ("0", "2")]
        self.observe = observe

    def weights(self, k, int8):
        weight = self.layers[k].weight.detach().numpy()
        return rounded(weight, np.float32(np.abs(weight).max(1, keepdims=True)) / np.float32(127)) if int8 else weight

    def activation(self, x, k):
        return rounded(x, self.thresholds[k] / 127)

    def run(self, x, *int8):
        seen = []
        for k in (0, 1):
            entering = self.activation(x, k) if k in int8 and self.observe == "inputs" else x
            y = entering @ self.weights(k, k in int8).T + self.layers[k].bias.detach().numpy()
            y = self.activation(y, k) if k in int8 and self.observe == "outputs" else y
            seen.append((x, y))
            x = np.maximum(y, 0)
        return seen


@pytest.mark.parametrize("observe", ["inputs", "outputs"])
def test_all_numbers_by_hand(observe):
    model = ready(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))
    thresholds = {"0": clipping(1.3), "2": clipping(2.1)}
    found = diagnosed(model, [X], thresholds, observe=observe)
    hand = Mlp(model, thresholds, observe)
    floats, int8 = hand.run(X.numpy()), hand.run(X.numpy(), 0, 1)
    layers = by_name(found)
    for k, name in enumerate(("0", "2")):
        observed = floats[k][0 if observe == "inputs" else 1]
        expected = (
            sqnr(hand.weights(k, False), hand.weights(k, True)),
            sqnr(observed, hand.activation(observed, k)),
            cosine(floats[k][1], int8[k][1]),
            sqnr(floats[k][1], int8[k][1]),
            sqnr(floats[1][1], hand.run(X.numpy(), k)[1][1]),
            sqnr(floats[1][1], hand.run(X.numpy(), 1 - k)[1][1]),
        )
        assert layers[name][1:-1] == pytest.approx(expected, rel=1e-6)
        assert len(set(expected)) == 6
        assert layers[name].note == ""
    assert found.model_sqnr_db == pytest.approx(layers["2"].output_sqnr_db, rel=1e-12)
    assert found.model_cosine == pytest.approx(layers["2"].output_cosine, rel=1e-12)


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [7, 30, 3], [39, 1]])
def test_the_split_into_batches_does_not_matter(sizes):
    model = chain()
    thresholds = amax_thresholds(model, X)
    whole, parts = (diagnosed(model, batches, thresholds) for batches in ([X], X.split(sizes)))
    assert [layer.name for layer in whole.layers] == [layer.name for layer in parts.layers]
    for one, other in zip(whole.layers, parts.layers, strict=True):
        assert one[1:-1] == pytest.approx(other[1:-1], rel=1e-9)
    assert whole[1:] == pytest.approx(parts[1:], rel=1e-9)


def test_a_layer_with_its_relu_is_judged_behind_the_relu():
    model = ready(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))
    folded, _ = fold_relu(model, X)
    thresholds = {"0": clipping(1.3), "2": clipping(2.1)}
    hand = Mlp(model, thresholds, "inputs")
    (_, y), (_, z) = hand.run(X.numpy())[0], hand.run(X.numpy(), 0, 1)[0]
    found = by_name(diagnosed(folded, [X], thresholds))["0"]
    assert found.output_sqnr_db == pytest.approx(sqnr(np.maximum(y, 0), np.maximum(z, 0)), rel=1e-6)
    assert found.weight_sqnr_db == pytest.approx(sqnr(hand.weights(0, False), hand.weights(0, True)), rel=1e-6)


def test_a_layer_called_twice_is_judged_on_both_calls():
    once = ready(nn.Sequential(nn.Linear(4, 4)))
    twice = Net(lambda net, x, y: (net.fc(x), net.fc(y)), fc=once[0]).eval()
    joined = by_name(diagnosed(once, [X], {"0": clipping(1.0)}))["0"]
    parts = by_name(diagnosed(twice, [tuple(X.split(15)[:2]), tuple(X[30:].split(5))], {"fc": clipping(1.0)}))["fc"]
    assert parts[1:-1] == pytest.approx(joined[1:-1], rel=1e-9)


@pytest.mark.parametrize("observe", ["inputs", "outputs"])
def test_a_model_that_is_a_single_layer(observe):
    found = diagnosed(chain(depth=1)[0], [X], observe=observe)
    (layer,) = found.layers
    assert layer.name == ""
    assert layer.alone_sqnr_db == pytest.approx(found.model_sqnr_db)
    assert 20 < layer.alone_sqnr_db < 60
    assert layer.without_sqnr_db == math.inf


def test_a_layer_in_two_places_is_switched_in_both():
    fc = chain(depth=1)[0]
    shared = nn.Sequential(nn.Sequential(fc), nn.Tanh(), nn.Sequential(fc)).eval()
    found = diagnosed(shared, [X])
    (layer,) = found.layers
    assert layer.name == "0.0"
    assert layer.alone_sqnr_db == pytest.approx(found.model_sqnr_db)
    assert layer.without_sqnr_db == math.inf


# --- the ranking ---


@pytest.mark.parametrize("broken", ["0", "2", "4"])
@pytest.mark.parametrize("sensitivity", [True, False])
def test_a_broken_layer_comes_first(broken, sensitivity):
    model = chain()
    thresholds = amax_thresholds(model, X)
    thresholds[broken] = clipping(thresholds[broken].threshold / 20)
    found = diagnosed(model, [X], thresholds, sensitivity=sensitivity)
    if sensitivity:
        first, *others = found.layers
        assert first.name == broken
        assert first.alone_sqnr_db < 20 < min(layer.alone_sqnr_db for layer in others)
        assert first.without_sqnr_db > 20 > max(layer.without_sqnr_db for layer in others)
        assert [layer.alone_sqnr_db for layer in found.layers] == sorted(layer.alone_sqnr_db for layer in found.layers)
    else:
        order = [layer.output_sqnr_db for layer in found.layers]
        assert order == sorted(order)
        assert all(math.isnan(value) for layer in found.layers for value in layer[5:7])
        assert by_name(found)[broken].activation_sqnr_db < 10


@pytest.mark.parametrize(("sensitivity", "runs"), [(True, 8), (False, 2)])
def test_the_float_model_runs_once_for_each_batch(sensitivity, runs):
    model, ran = chain(), []

    def forward(module, x):
        ran.append(module is model)
        return module(x)

    diagnosed(model, list(X.split(10)), forward=forward, sensitivity=sensitivity)
    assert ran == 4 * [True, *[False] * (runs - 1)]


# --- what models return ---


@dataclass
class Output:
    logits: torch.Tensor
    classes: torch.Tensor


RETURNED = {
    "tuple": lambda y: (y.argmax(1), y),
    "mapping": lambda y: {"classes": y.argmax(1), "logits": [y]},
    "dataclass": lambda y: Output(y, y.argmax(1)),
    "parts": lambda y: (y[:, :1], {"rest": y[:, 1:]}),
}


@pytest.mark.parametrize("kind", RETURNED)
def test_all_floating_point_tensors_of_the_output_are_compared(kind):
    model = chain()
    wrapped = Net(lambda net, x: RETURNED[kind](net.body(x)), body=model).eval()
    plain, found = diagnosed(model, [X]), diagnosed(wrapped, [X])
    assert found[1:] == pytest.approx(plain[1:], rel=1e-12)
    for layer, other in zip(found.layers, plain.layers, strict=True):
        assert layer[1:-1] == pytest.approx(other[1:-1], rel=1e-12)


def test_masked_outputs_are_left_out():
    def run(net, x):
        y = net.body(x)
        return torch.cat([y, torch.full_like(y, -torch.inf)])

    model = chain()
    found = diagnosed(Net(run, body=model).eval(), [X])
    assert found[1:] == pytest.approx(diagnosed(model, [X])[1:], rel=1e-12)


def test_an_output_without_floating_point_tensors_is_refused():
    model = Net(lambda net, x: net.fc(x).argmax(1), fc=chain(depth=1)[0]).eval()
    with pytest.raises(InvalidInputError, match=r"batch 0: the model must return a floating point tensor.*logits"):
        diagnosed(model, [X])
    assert num_hooks(model) == 0


def test_outputs_of_other_shapes_in_int8_are_refused_with_the_batch():
    def run(net, x):
        y = net.fc(x)
        return y if len(x) == 10 else y[: 5 if type(net.fc) is nn.Linear else 4]

    model = Net(run, fc=chain(depth=1)[0]).eval()
    with pytest.raises(
        InvalidInputError, match=r"batch 1: the model must return the same shapes .* \[\(5, 4\)\], got \[\(4, 4\)\]"
    ):
        diagnosed(model, [X[:10], X[:30]], {"fc": clipping(2.0)})


# --- layers that cannot be compared ---


def skip_a_call(net, x):
    return net.second(net.first(x)) if type(net.first) is nn.Linear else net.first(x)


def add_a_call(net, x):
    y = net.second(net.first(x))
    return y if type(net.first) is nn.Linear else net.second(y)


def drop_a_row(net, x):
    y = net.first(x)
    rest = y if type(net.first) is nn.Linear else y[1:]
    net.second(rest)
    return y


@pytest.mark.parametrize("run", [skip_a_call, add_a_call, drop_a_row])
def test_calls_that_differ_are_noted_and_not_compared(run):
    model = ready(Net(run, first=nn.Linear(4, 4), second=nn.Linear(4, 4)))
    found = by_name(diagnosed(model, list(X.split(20))))
    assert found["second"].note.startswith("batch 0: its calls differ in number or shape")
    assert math.isnan(found["second"].output_cosine)
    assert math.isnan(found["second"].output_sqnr_db)
    assert all(math.isfinite(getattr(found["second"], name)) for name in ("weight_sqnr_db", "activation_sqnr_db"))
    assert found["first"].note == ""
    assert math.isfinite(found["first"].output_sqnr_db)


@pytest.mark.parametrize("sensitivity", [True, False])
def test_a_layer_that_is_not_called_is_noted_and_comes_last(sensitivity):
    model = ready(Net(lambda net, x: net.b(x), a=nn.Linear(4, 4), b=nn.Linear(4, 4)))
    found = diagnosed(model, [X], {"a": clipping(1.0), "b": clipping(1.0)}, sensitivity=sensitivity)
    assert [layer.name for layer in found.layers] == ["b", "a"]
    assert found.layers[1].note == "never called on these data"
    assert math.isnan(found.layers[1].activation_sqnr_db)
    assert found.layers[0].note == ""


def test_a_layer_without_a_threshold_stays_in_floating_point():
    model = chain()
    thresholds = amax_thresholds(model, X)
    del thresholds["2"]
    found = diagnosed(model, [X], thresholds)
    assert {layer.name for layer in found.layers} == {"0", "4"}
    full = by_name(diagnosed(model, [X]))["2"]
    assert found.model_sqnr_db == pytest.approx(full.without_sqnr_db, rel=1e-12)


def test_writing_to_outputs_in_place_changes_nothing():
    def run(net, x):
        y = net.first(x)
        y *= 3
        z = net.second(y)
        return z.relu_()

    def plain(net, x):
        return net.second(net.first(x) * 3).relu()

    layers = {"first": chain(depth=1)[0], "second": chain(depth=1, seed=1)[0]}
    thresholds = {"first": clipping(1.0), "second": clipping(4.0)}
    found, expected = (diagnosed(Net(f, **layers).eval(), [X], thresholds) for f in (run, plain))
    assert found == expected


# --- manners ---


def test_nothing_of_the_model_changes():
    model = fold_relu(ready(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))), X)[0]
    before, data = fingerprint(model), X.clone()
    diagnosed(model, [X], {"0": clipping(1.0), "2": clipping(1.0)})
    assert fingerprint(model) == before
    assert torch.equal(X, data)


@pytest.mark.parametrize("run", range(8))
def test_hooks_come_off_after_an_exception_in_any_run(run):
    model, left = chain(), [run]
    thresholds = amax_thresholds(model, X)
    before = fingerprint(model)

    def forward(module, x):
        result = module(x)
        left[0] -= 1
        if left[0] < 0:
            raise Broken
        return result

    with pytest.raises(Broken):
        diagnosed(model, [X], thresholds, forward=forward)
    assert fingerprint(model) == before


class Copied(nn.Module):
    """Counts how often it is copied."""

    copies = 0

    def __deepcopy__(self, memo):
        Copied.copies += 1
        return Copied().eval()

    def forward(self, x):
        return x


def test_there_is_one_copy_of_the_model(monkeypatch):
    monkeypatch.setattr(Copied, "copies", 0)
    diagnosed(nn.Sequential(chain(), Copied()).eval(), list(X.split(10)))
    assert Copied.copies == 1


def test_no_output_outlives_its_batch():
    model, outputs_seen, alive = chain(), [], []

    def forward(module, x):
        alive.append(sum(output() is not None for output in outputs_seen))
        result = module(x)
        outputs_seen.append(weakref.ref(result))
        return result

    diagnosed(model, list(X.split(5)), forward=forward)
    assert len(alive) == 8 * 8
    assert max(alive) <= 1


def test_outputs_may_be_written_to_one_place():
    """As a model captured in a CUDA graph does."""
    model, place = chain(), torch.empty(40, 4, dtype=torch.float64)
    found = diagnosed(model, [X], forward=lambda module, x: place.copy_(module(x)))
    assert found == diagnosed(model, [X])


def test_batches_may_be_mappings_and_a_generator():
    model = Net(lambda net, *, x, factor: net.fc(x) * factor, fc=chain(depth=1)[0]).eval()
    batches = ({"x": part, "factor": 2.0} for part in X.split(10))
    found = diagnosed(model, batches, {"fc": clipping(1.5)})
    assert found.model_sqnr_db == pytest.approx(
        diagnosed(chain(depth=1), [X], {"0": clipping(1.5)}).model_sqnr_db, rel=1e-9
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_models_are_judged_in_float64(dtype):
    model = ready(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), dtype=dtype)
    wide = ready(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))
    thresholds = {"0": clipping(1.0), "2": clipping(1.0)}
    found, expected = diagnosed(model, [X.to(dtype)], thresholds), diagnosed(wide, [X], thresholds)
    assert found.model_sqnr_db == pytest.approx(expected.model_sqnr_db, abs=1.0)
    assert by_name(found)["0"].activation_sqnr_db == pytest.approx(by_name(expected)["0"].activation_sqnr_db, abs=0.2)


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(InvalidInputError, match="training mode"):
        diagnosed(chain().train(), [X], {})


def test_no_data_are_refused():
    with pytest.raises(InvalidInputError, match="expected at least one batch, got none"):
        diagnosed(chain(), [], {"0": clipping(1.0)})


def test_another_place_to_observe_is_refused():
    with pytest.raises(InvalidInputError, match="`observe` must be 'inputs' or 'outputs'"):
        diagnosed(chain(), [X], {"0": clipping(1.0)}, observe="weights")


@pytest.mark.parametrize("shown", [True, False])
def test_progress_is_shown_on_a_terminal_if_asked_for(monkeypatch, shown):
    written = []
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "write", lambda text: written.append(text) or len(text))
    monkeypatch.setenv("TERM", "xterm")
    diagnosed(chain(), list(X.split(20)), progress=shown)
    assert ("diagnosis" in "".join(written)) == shown
    assert ("100%" in "".join(written)) == shown


@pytest.mark.parametrize("sensitivity", [True, False])
def test_the_bar_has_a_step_for_every_run(monkeypatch, sensitivity):
    totals, steps = [], []
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=io.StringIO(), force_terminal=True))
    monkeypatch.setattr(Progress, "add_task", lambda self, description, total: totals.append(total))
    monkeypatch.setattr(Progress, "advance", lambda self, task: steps.append(task))
    diagnosed(chain(), list(X.split(20)), sensitivity=sensitivity, progress=True)
    assert totals == [len(steps)] == [2 * (8 if sensitivity else 2)]


def test_progress_is_silent_off_a_terminal(capfd):
    diagnosed(chain(), [X], progress=True)
    assert capfd.readouterr() == ("", "")


# --- JSON ---


def test_json_holds_every_number():
    found = diagnosed(chain(), [X])
    content = json.loads(found.as_json())
    assert content["layers"] == [layer._asdict() for layer in found.layers]
    assert content["model_sqnr_db"] == found.model_sqnr_db
    assert Diagnosis.from_json(found.as_json()) == found


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"layers": [1]}', '{"layers": [{"a": 1}]}', "[" * 100_000], ids=len)
def test_what_is_no_diagnosis_is_refused(text):
    with pytest.raises(InvalidInputError, match=r"`text` must be what Diagnosis.as_json wrote"):
        Diagnosis.from_json(text)


def test_json_has_null_for_what_is_not_finite():
    layer = LayerDiagnosis("a.b", 40.0, math.inf, math.nan, 30.0, -math.inf, 2.0, "why")
    text = Diagnosis([layer], math.inf, math.nan).as_json()

    def refuse(constant):
        raise AssertionError(constant)

    content = json.loads(text, parse_constant=refuse)
    assert content["model_sqnr_db"] is content["model_cosine"] is None
    assert [content["layers"][0][name] for name in NUMBERS] == [40.0, None, None, 30.0, None, 2.0]
    again = Diagnosis.from_json(text)
    assert again.as_json() == text
    assert again.layers[0].note == "why"
    assert math.isnan(again.model_sqnr_db)


def test_layers_are_tried_on_the_first_64_samples(monkeypatch):
    """Batches of 20: the fourth one brings them to 80, and no other is used."""
    runs = []
    monkeypatch.setattr(Measurements, "try_each_layer", lambda self, run: runs.append(run.number))
    diagnosed(chain(), [X[:20]] * 7)
    assert runs == [0, 1, 2, 3]
