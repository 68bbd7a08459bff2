"""Residual sums whose shortcut TensorRT quantizes are observed and rounded like layers."""

import operator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from klquant.backends.torch import (
    Calibration,
    Product,
    Quantizer,
    apply_folds,
    auto,
    examine,
    fake_quantize,
    quantize,
    requantize,
    tune,
    unfreeze_weights,
)
from klquant.errors import InvalidInputError
from support import zoo
from support.networks import Net, batch, is_same, outputs, ready

pytestmark = pytest.mark.filterwarnings(
    "ignore:layer `[^`]*`. (T =|expected SQNR):klquant.errors.CalibrationWarning",
    "ignore:.*it was never called:klquant.errors.CalibrationWarning",
)
X = batch(3, 4, 6, 6, dtype=torch.float32)
OPTIONS = {"criterion": "max", "num_bins": 255, "engine": "tensorrt"}
SHORTCUT = ":add.0.other"


def network(run, **modules):
    """Return a network with three convolutions, three linear layers, a BatchNorm and a parameter."""
    layers = {name: nn.Conv2d(4, 4, 3, padding=1) for name in "abc"}
    linears = {"wide": nn.Linear(6, 6), "plain": nn.Linear(6, 6, bias=False), "last": nn.Linear(144, 144)}
    net = Net(run, **layers, **linears, norm=nn.BatchNorm2d(4), **modules)
    net.kernel = nn.Parameter(torch.empty(4, 1, 1))
    return ready(net, dtype=torch.float32)


def in_place(x, y):
    x += y
    return x


def after(x, y):
    """Add in place without using what the function returns."""
    x.add_(y)
    return x


def read_again(x, y):
    return F.relu(x + y) + x.mean()


def twice(x):
    return x + x


def sums(run, **options):
    """Return the names of the sums that are rounded."""
    thresholds = quantize(network(run), [X], **{**OPTIONS, **options}).thresholds
    return [name for name in thresholds if ":add" in name]


RESIDUAL = {
    "the layer first": (lambda net, x: net.a(x) + x, "other"),
    "the shortcut first": (lambda net, x: x + net.a(x), "input"),
    "torch.add": (lambda net, x: torch.add(net.a(x), x), "other"),
    "by keyword": (lambda net, x: torch.add(input=x, other=net.a(x)), "input"),
    "operator": (lambda net, x: operator.add(net.a(x), x), "other"),
    "aten": (lambda net, x: torch.ops.aten.add.Tensor(net.a(x), x), "other"),
    "in place": (lambda net, x: F.relu(in_place(net.a(x), x)), "other"),
    "in place, result dropped": (lambda net, x: F.relu(after(net.a(x), x)), "other"),
    "the shortcut in place": (lambda net, x: F.relu(after(x * 2, net.a(x))), "input"),
    "behind a BatchNorm": (lambda net, x: net.norm(net.a(x)) + x, "other"),
    "behind dropout": (lambda net, x: F.dropout(net.a(x), 0.5, training=False) + x, "other"),
    "two layers": (lambda net, x: net.a(net.b(x)) + net.c(x), "other"),
    "two layers, the shallower first": (lambda net, x: net.a(F.relu(x)) + net.c(net.b(x)), "input"),
    "two layers of one depth": (lambda net, x: net.a(x) + net.b(x), "input"),
    "broadcast": (lambda net, x: net.a(x) + x.mean((2, 3), keepdim=True), "other"),
    "no bias": (lambda net, x: net.plain(x) + x, "other"),
    "rows": (lambda net, x: net.last(x.flatten(1)) + x.flatten(1), "other"),
}

OTHER = {
    "a constant": lambda net, x: net.a(x) + net.kernel,
    "computed constant": lambda net, x: net.a(x) + net.kernel.exp(),
    "scalar": lambda net, x: net.a(x) + 1.0,
    "a tensor made in the model": lambda net, x: net.a(x) + torch.arange(x.shape[-1]) * torch.tensor(0.5),
    "scaled": lambda net, x: torch.add(net.a(x), x, alpha=2),
    "behind a ReLU": lambda net, x: F.relu(net.a(x)) + x,
    "behind a function": lambda net, x: net.a(x) * 2 + x,
    "no layer": lambda net, x: net.a(x + x * 2),
    "read elsewhere": lambda net, x: read_again(net.a(x), x),
    "to itself": lambda net, x: twice(net.a(x)),
    "the sum of a sum": lambda net, x: F.relu(in_place(in_place(net.a(x), net.kernel), x)),
    "a bias that is another node": lambda net, x: net.wide(x) + x,
}


@pytest.mark.parametrize("case", RESIDUAL)
def test_the_shortcut_of_a_residual_sum_is_rounded(case):
    run, shortcut = RESIDUAL[case]
    assert sums(run) == [f":add.0.{shortcut}"]


@pytest.mark.parametrize("case", OTHER)
def test_other_sums_stay_in_floating_point(case):
    assert sums(OTHER[case]) == []


@pytest.mark.parametrize("engine", [None, "onnxruntime", "openvino"])
def test_sums_are_rounded_for_tensorrt_alone(engine):
    assert sums(RESIDUAL["the layer first"][0], engine=engine) == []
    assert examine(network(RESIDUAL["the layer first"][0]), X, engine=engine).products == []


@pytest.mark.parametrize("engine", [None, "tensorrt"])
@pytest.mark.parametrize("make", [auto, tune])
def test_auto_and_tune_measure_what_the_engine_rounds(make, engine):
    model = network(RESIDUAL["the layer first"][0])
    found = make(model, [X, X * 0.5, X * 2, X], engine=engine, num_bins=255, target=0.0, progress=False).quantized
    assert [name for name in found.thresholds if ":add" in name] == ([SHORTCUT] if engine else [])


def test_trials_for_another_engine_are_not_resumed(tmp_path):
    model, options = network(RESIDUAL["the layer first"][0]), {"num_bins": 255, "max_runs": 1, "progress": False}
    tune(model, [X], engine="tensorrt", resume=tmp_path / "log.json", **options)
    with pytest.raises(InvalidInputError, match="must come from a tuning of this model, data and options"):
        tune(model, [X], resume=tmp_path / "log.json", **options)


@pytest.mark.parametrize("make", [examine, Quantizer])
def test_an_unknown_engine_is_refused(make):
    given = (X,) if make is examine else ()
    with pytest.raises(InvalidInputError, match=r"`engine` must be one of .* did you mean 'tensorrt'"):
        make(network(lambda net, x: net.a(x)), *given, engine="trt")


@pytest.mark.parametrize("case", [case for case in RESIDUAL if "layers" not in case])
def test_the_simulation_computes_the_sum_of_the_rounded_shortcut(case):
    model = network(RESIDUAL[case][0])
    found = quantize(model, [X], **OPTIONS)
    name = next(name for name in found.thresholds if ":add" in name)
    seen = []
    floats = apply_folds(model, found.folds, products=examine(model, X, engine="tensorrt").products)
    floats.get_submodule(name).register_forward_hook(lambda tap, args, output: seen.append(output.clone()))
    expected = outputs(floats, X)
    torch.testing.assert_close(expected, outputs(model, X), rtol=1e-4, atol=1e-4)  # with points, and folded
    step = seen[0].abs().max() / 127
    assert found.thresholds[name].threshold == pytest.approx(127 * float(step))
    floats.get_submodule(name).register_forward_hook(lambda tap, args, output: fake_quantize(output, step))
    rounded = outputs(floats, X)
    assert 0 < (rounded - expected).abs().max() <= 0.51 * step + 1e-5
    only = quantize(model, [X], **OPTIONS, overrides={"*": {"num_bits": 16}, ":add.0": {"num_bits": 8}}).model
    torch.testing.assert_close(outputs(only, X), rounded, rtol=0, atol=0.25 * float(step))  # 16 bits elsewhere


def test_a_block_that_is_called_again_has_a_range_for_each_call():
    block = Net(lambda net, x: F.relu(net.conv(x) + x), conv=nn.Conv2d(4, 4, 3, padding=1))
    found = quantize(network(lambda net, x: net.block(net.block(x)), block=block), [X], **OPTIONS).thresholds
    assert [name for name in found if "add" in name] == ["block:add.0.other@0", "block:add.0.other@1"]
    assert found["block:add.0.other@0"].amax == pytest.approx(float(X.abs().max()))
    assert found["block:add.0.other@1"].amax == found["block.conv@1"].amax != found["block:add.0.other@0"].amax


def test_a_sum_that_differs_between_calls_of_its_module_stays_in_floating_point():
    block = Net(lambda net, x, y: x + y)
    model = network(lambda net, x: net.block(net.block(net.a(x), x), net.b(x)), block=block)
    assert not [name for name in quantize(model, [X], **OPTIONS).thresholds if "add" in name]


def test_names_count_all_sums_of_a_module_and_none_of_those_inside():
    """Also those that are not residual, and before and after them."""

    def run(net, x):
        y = net.inner(net.a(x) + net.kernel) + x.mean()
        return net.b(y + 2 * y) + y

    inner = Net(lambda net, x: (x + 3 * x) + (x + 4 * x))
    found = quantize(network(run, inner=inner), [X], **OPTIONS).thresholds
    assert [name for name in found if "add" in name] == [":add.3.other"]
    y = outputs(network(lambda net, x: net.inner(net.a(x) + net.kernel) + x.mean(), inner=inner), X)
    assert found[":add.3.other"].amax == pytest.approx(float(y.abs().max()), rel=1e-5)


def test_layers_and_sums_are_excluded_and_get_options_by_name():
    blocks, _ = zoo.load("resnet", torch.float32)
    data = zoo.images()
    data = [x.float() for x in data]
    names = {"3:add.0.other", "4:add.0.other"}
    assert names <= quantize(blocks, data, **OPTIONS).thresholds.keys()
    without = quantize(blocks, data, **OPTIONS, exclude="3:add.0")
    assert names & without.thresholds.keys() == {"4:add.0.other"}
    assert without.skipped == {"3:add.0.other": "excluded by the settings"}
    options = {"4:add.0": {"num_bits": 5}, "3:*": {"threshold": 2.5}}
    found = quantize(blocks, data, **OPTIONS, overrides=options).thresholds
    assert (found["4:add.0.other"].num_bits, found["3:add.0.other"].threshold) == (5, 2.5)


def test_a_sum_follows_its_layer_which_may_be_excluded_at_any_stage():
    model = network(lambda net, x: net.b(net.a(x) + x))
    found = quantize(model, [X], **OPTIONS, exclude="a")
    assert [*found.thresholds] == [*found.calibration.amax] == ["b"]  # it is not observed
    quantizer = Quantizer(model, engine="tensorrt", num_bins=255, progress=False)
    quantizer._collect(X, [X], equalize=False)
    quantizer.search_thresholds()
    result = quantizer.simulate(exclude="a")
    assert [*result.thresholds] == ["b"]
    assert result.skipped.items() >= dict.fromkeys(["a", SHORTCUT], "excluded by the settings").items()
    assert [*quantizer.simulate(exclude="b").thresholds] == ["a", SHORTCUT]


def test_a_saved_calibration_rounds_the_same_sums(tmp_path):
    model = network(RESIDUAL["in place"][0])
    result = quantize(model, [X], **OPTIONS)
    result.calibration.save(tmp_path / "found.npz")
    again = requantize(model, Calibration.load(tmp_path / "found.npz"))
    assert again.thresholds.keys() == result.thresholds.keys() == {"a", SHORTCUT}
    assert is_same(outputs(again.model, X), outputs(result.model, X))


def test_gradients_pass_through_a_sum_and_its_values_are_those_without_gradients():
    result = quantize(network(lambda net, x: net.b(net.a(x) + x) + x), [X], **OPTIONS)
    given = X.clone().requires_grad_()
    got = result.model(given)
    assert is_same(got.detach(), outputs(result.model, X))
    got.sum().backward()
    assert given.grad.abs().min() > 0


@pytest.mark.filterwarnings("ignore:.*conv2d computes in floating point:klquant.errors.CalibrationWarning")
def test_the_rounding_of_layers_and_weights_does_not_count_among_the_sums():
    """Not in training either, where rounding adds, and also where a function reads the weight of a layer."""
    model = network(lambda net, x: net.b(F.conv2d(x, net.b.weight) + net.c(net.a(x) + x)[..., 1:-1, 1:-1]))
    simulated = quantize(model, [X], **OPTIONS).model
    expected = outputs(simulated, X)
    for trained in (simulated, unfreeze_weights(simulated)):
        assert is_same(trained(X.clone().requires_grad_()).detach(), expected)


def test_equalization_and_correction_go_on_beside_sums():
    model = network(lambda net, x: net.c(F.relu(net.b(F.relu(net.a(x))) + x)))
    result = quantize(model, [X], **OPTIONS, equalize=True, correct_bias=True)
    assert {"a", "b", "c", SHORTCUT} == result.thresholds.keys()
    assert (outputs(result.model, X) - outputs(model, X)).norm() < 0.05 * outputs(model, X).norm()


def test_sums_in_a_record_name_the_layer_that_they_are_fused_with():
    model = network(lambda net, x: x + net.norm(net.a(x)))
    assert examine(model, X, engine="tensorrt").products == [Product("", "add", 0, "input", "a.weight")]
