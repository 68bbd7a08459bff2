import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from klquant.backends.accuracy.criterion_choice import choose
from klquant.backends.torch import (
    LayerThreshold,
    collect_amax,
    collect_histograms,
    fold_relu,
    quantize_weights,
    search_thresholds,
)
from klquant.backends.torch.accuracy.criterion_choice import choose_criterion
from klquant.errors import InvalidInputError
from support.networks import Broken, Net, batch, fingerprint, ready

# a few hundred values are clipped hard by the entropy criterion, and a warning says so
pytestmark = pytest.mark.filterwarnings("ignore:layer `.*`. (T =|expected SQNR):klquant.errors.CalibrationWarning")
X = batch(60, 4)


def clipping(value):
    return LayerThreshold(value, value, math.nan, 0.0)


def candidates(**thresholds):
    """Return candidates for the layer `0` of a model."""
    return {criterion: {"0": clipping(value)} for criterion, value in thresholds.items()}


def chosen(model, batches, given, **options):
    return choose_criterion(model, quantize_weights(model), given, batches, **options)


def searched(model, batches, **options):
    """Choose among all criteria, each searched on the histograms of the data."""
    amax = collect_amax(model, batches, **options)
    histograms = collect_histograms(model, batches, amax, **options)
    names = ("max", "mse", "percentile", "entropy")
    return chosen(
        model, batches, {c: search_thresholds(amax, histograms, criterion=c, guard=False) for c in names}, **options
    )


def rounded(x, scale):
    scale = np.asarray(scale, np.float32).astype(np.float64)
    return np.clip(np.rint(x / scale), -127, 127) * scale


def error_by_hand(x, layer, threshold, observe, relu=False):
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    int8 = rounded(weight, np.float32(np.abs(weight).max(1, keepdims=True)) / np.float32(127))
    y = x @ weight.T + bias
    approximation = rounded(x, threshold / 127) @ int8.T + bias
    if relu:
        y, approximation = np.maximum(y, 0), np.maximum(approximation, 0)
    return ((y - (approximation if observe == "inputs" else rounded(y, threshold / 127))) ** 2).sum()


@pytest.mark.parametrize("observe", ["inputs", "outputs"])
@pytest.mark.parametrize("relu", [False, True])
def test_errors_by_hand(observe, relu):
    model = ready(nn.Sequential(nn.Linear(4, 3), nn.ReLU()))
    layer = model[0]
    if relu:
        model, _ = fold_relu(model, X)
    given = {"max": 4.0, "entropy": 1.1, "mse": 2.5}
    found = chosen(model, [X], candidates(**given), observe=observe)["0"]
    expected = {name: error_by_hand(X.numpy(), layer, value, observe, relu) for name, value in given.items()}
    assert found.errors == pytest.approx(expected, rel=1e-6)
    assert found.criterion == min(expected, key=expected.get)


def test_each_layer_gets_what_it_gets_in_the_float_model():
    """Errors of layers before it do not count."""
    model = ready(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)))
    given = {"max": {"0": clipping(0.01), "1": clipping(3.0)}, "mse": {"0": clipping(0.02), "1": clipping(2.0)}}
    found = chosen(model, [X], given)
    x = model[0](X).detach().numpy()
    expected = {"max": error_by_hand(x, model[1], 3.0, "inputs"), "mse": error_by_hand(x, model[1], 2.0, "inputs")}
    assert found["1"].errors == pytest.approx(expected, rel=1e-6)
    assert list(found) == ["0", "1"]


def test_the_maximum_where_clipping_hurts():
    """The one value that a clipping criterion gives up is what the layer listens to."""
    model = ready(nn.Sequential(nn.Linear(4, 3)))
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([1e-4, 1e-4, 1e-4, 1.0])
    x = batch(20_000, 4)
    x[:, 3] = 0
    x[::1000, 3] = 20.0
    found = searched(model, [x])["0"]
    assert found.criterion == "max"
    assert found.errors["max"] < found.errors["mse"] < found.errors["entropy"]


@pytest.mark.parametrize("observe", ["inputs", "outputs"])
def test_a_clipping_criterion_where_a_rare_outlier_exists(observe):
    x = batch(20_000, 1)
    x[7] = 100.0
    model = ready(nn.Sequential(nn.Linear(1, 1)))
    found = searched(model, [x], observe=observe)["0"]
    assert found.criterion in ("entropy", "percentile", "mse")
    assert found.errors[found.criterion] < found.errors["max"]


def test_an_outlier_that_the_weights_ignore_may_be_clipped():
    """The error of the tensor itself says the opposite."""
    model = ready(nn.Sequential(nn.Linear(2, 1)))
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([1.0, 0.0])
    x = torch.stack([torch.linspace(-1, 1, 100), torch.full((100,), 9.0)], 1).double()
    clipped, whole = rounded(x.numpy(), 1 / 127), rounded(x.numpy(), 9 / 127)
    assert np.square(clipped - x.numpy()).sum() > np.square(whole - x.numpy()).sum()
    assert chosen(model, [x], candidates(max=9.0, entropy=1.0))["0"].criterion == "entropy"


@pytest.mark.parametrize("sizes", [[1] * 60, [7, 50, 3], [59, 1]])
def test_the_split_into_batches_does_not_matter(sizes):
    model = ready(nn.Sequential(nn.Linear(4, 3)))
    given = candidates(max=4.0, entropy=1.1, mse=2.5)
    whole, parts = (chosen(model, batches, given)["0"] for batches in ([X], X.split(sizes)))
    assert parts.criterion == whole.criterion
    assert parts.errors == pytest.approx(whole.errors, rel=1e-9)


def test_all_calls_of_a_layer_count():
    layer = ready(nn.Linear(4, 3))
    model = Net(lambda net, x: (net.fc(x), net.fc(input=3 * x)), fc=layer).eval()
    found = chosen(model, [X], {"max": {"fc": clipping(4.0)}})["fc"]
    parts = [error_by_hand(k * X.numpy(), layer, 4.0, "inputs") for k in (1, 3)]
    assert found.errors["max"] == pytest.approx(sum(parts), rel=1e-6)


def test_a_layer_is_evaluated_once_for_each_distinct_threshold():
    model = ready(nn.Sequential(nn.Linear(4, 3)))
    count = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: count.append(type(module)) if type(module) is nn.Linear else None
    )
    try:
        found = chosen(model, [X], candidates(max=4.0, entropy=2.5, percentile=4.0, mse=2.5))["0"]
    finally:
        handle.remove()
    assert len(count) == 1 + 2
    assert found.errors["max"] == found.errors["percentile"] != found.errors["mse"] == found.errors["entropy"]


@pytest.mark.parametrize(
    ("errors", "criterion"),
    [
        ({"max": 1.0, "percentile": 1.0, "mse": 1.0, "entropy": 1.0}, "entropy"),
        ({"max": 1.0, "percentile": 1.0, "mse": 1.0, "entropy": 1.1}, "mse"),
        ({"max": 1.0, "percentile": 1.0, "mse": 1.1, "entropy": 1.1}, "percentile"),
        ({"max": 1.0, "percentile": 1.1, "mse": 1.1, "entropy": 1.1}, "max"),
        ({"own": 1.0, "max": 1.0}, "max"),
        ({"own": 0.5, "max": 1.0}, "own"),
        ({"max": 1.0, "entropy": math.nan}, "max"),
    ],
)
def test_ties_go_to_the_preferred_criterion(errors, criterion):
    assert choose(errors) == (criterion, errors)


def test_a_tensor_of_zeros_takes_the_default():
    model = ready(nn.Sequential(nn.Linear(4, 3)))
    given = candidates(max=127.0, entropy=127.0, mse=127.0)
    assert chosen(model, [torch.zeros(5, 4, dtype=torch.float64)], given)["0"].criterion == "entropy"


# --- manners ---


def test_nothing_of_the_model_changes_and_hooks_come_off_after_an_exception():
    model = ready(nn.Sequential(nn.Linear(4, 3)))
    before, data = fingerprint(model), X.clone()
    chosen(model, [X], candidates(max=4.0, mse=2.0))
    assert fingerprint(model) == before
    assert torch.equal(X, data)

    def forward(module, x):
        module(x)
        raise Broken

    with pytest.raises(Broken):
        chosen(model, [X], candidates(max=4.0), forward=forward)
    assert fingerprint(model) == before


def test_the_data_are_gone_through_once_with_forward():
    model = Net(lambda net, *, x: net.fc(x), fc=ready(nn.Linear(4, 3))).eval()
    batches = (({"x": part}, "label") for part in X.split(20))
    found = chosen(model, batches, {"max": {"fc": clipping(4.0)}}, forward=lambda module, b: module(**b[0]))
    assert found["fc"].errors["max"] == pytest.approx(error_by_hand(X.numpy(), model.fc, 4.0, "inputs"), rel=1e-6)


def test_wrong_arguments_are_refused():
    model = ready(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)))
    both = {"0": clipping(1.0), "1": clipping(1.0)}
    with pytest.raises(InvalidInputError, match=r"the same layers for each criterion, got some without \['1'\]"):
        chosen(model, [X], {"max": both, "mse": {"0": clipping(1.0)}})
    with pytest.raises(InvalidInputError, match="at least one criterion, got none"):
        chosen(model, [X], {})
    with pytest.raises(InvalidInputError, match="at least one calibration batch, got none"):
        chosen(model, [], candidates(max=1.0))
    with pytest.raises(InvalidInputError, match="training mode"):
        chosen(model.train(), [X], candidates(max=1.0))


def test_progress_is_shown_on_a_terminal(monkeypatch):
    written = []
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "write", lambda text: written.append(text) or len(text))
    monkeypatch.setenv("TERM", "xterm")
    chosen(ready(nn.Sequential(nn.Linear(4, 3))), [X, X], candidates(max=1.0), progress=True)
    assert "choice of criteria" in "".join(written)
    assert "100%" in "".join(written)
