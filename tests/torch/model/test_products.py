"""Functions that multiply activations are observed and rounded like layers."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from klquant.backends.torch import Calibration, Quantizer, examine, fake_quantize, quantize, requantize
from klquant.backends.torch.folding.apply import apply_folds
from klquant.backends.torch.model.products import Product, Routed
from klquant.errors import CalibrationWarning
from support.networks import Broken, Net, batch, fingerprint, is_same, outputs, ready

pytestmark = pytest.mark.filterwarnings("ignore:layer `[^`]*`. (T =|expected SQNR):klquant.errors.CalibrationWarning")
X = batch(3, 6, 8, dtype=torch.float32)
OPTIONS = {"criterion": "max", "num_bins": 255}


def block(run, **modules):
    """Return a network whose `inner` runs the function, between two layers, with a parameter `kernel`."""
    inner = Net(run, **modules)
    inner.kernel = nn.Parameter(torch.empty(8, 8))
    model = Net(
        lambda net, x: net.last(net.inner(net.first(x))), inner=inner, first=nn.Linear(8, 8), last=nn.Linear(8, 8)
    )
    return ready(model, dtype=torch.float32)


def rounded(x):
    return fake_quantize(x, x.abs().max() / 127)


def rounded_weight(w, axis):
    return fake_quantize(w, w.abs().amax([k for k in range(w.ndim) if k != axis]) / 127, axis=axis)


def attention(q, k, v):
    return rounded((rounded(q) @ rounded(k).mT * q.shape[-1] ** -0.5).softmax(-1)) @ rounded(v)


CASES = {
    "matmul": (lambda net, x: x @ x.mT, lambda w, x: rounded(x) @ rounded(x.mT)),
    "bmm": (lambda net, x: x.bmm(x.mT), lambda w, x: rounded(x) @ rounded(x.mT)),
    "baddbmm": (
        lambda net, x: torch.baddbmm(x[..., :6], x, x.mT, alpha=0.5),
        lambda w, x: x[..., :6] + 0.5 * rounded(x) @ rounded(x.mT),
    ),
    "einsum": (
        lambda net, x: torch.einsum("bij,bkj->bik", x, x + 1),
        lambda w, x: rounded(x) @ rounded(x + 1).mT,
    ),
    "einsum of a list": (
        lambda net, x: torch.einsum("bij,bkj->bik", [x, x + 1]),
        lambda w, x: rounded(x) @ rounded(x + 1).mT,
    ),
    "linear": (lambda net, x: F.linear(x, net.kernel), lambda w, x: rounded(x) @ rounded_weight(w, 0).T),
    "by keyword": (
        lambda net, x: F.linear(input=x, weight=net.kernel),
        lambda w, x: rounded(x) @ rounded_weight(w, 0).T,
    ),
    "computed weight": (
        lambda net, x: F.linear(x, net.kernel.softmax(-1)),
        lambda w, x: rounded(x) @ rounded_weight(w.softmax(-1), 0).T,
    ),
    "matmul with a weight": (lambda net, x: x @ net.kernel, lambda w, x: rounded(x) @ rounded_weight(w, 1)),
    "weight first": (
        lambda net, x: net.kernel[:6, :6] @ x,
        lambda w, x: rounded_weight(w[:6, :6], 0) @ rounded(x),
    ),
    "conv1d": (
        lambda net, x: F.conv1d(x.mT, net.kernel[:, :, None]).mT,
        lambda w, x: rounded(x) @ rounded_weight(w, 0).T,
    ),
    "conv_transpose1d": (
        lambda net, x: F.conv_transpose1d(x.mT, net.kernel[:, :, None]).mT,
        lambda w, x: rounded(x) @ rounded_weight(w, 1),
    ),
    "attention": (
        lambda net, x: F.scaled_dot_product_attention(x, x + 1, x - 1),
        lambda w, x: attention(x, x + 1, x - 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_operands_are_rounded_where_they_are_multiplied(case):
    run, expected = CASES[case]
    model = block(run)
    model.last = model.first = nn.Identity().eval()
    result = quantize(model, [X], **OPTIONS)
    assert all(name.startswith("inner:") for name in result.thresholds)
    assert result.skipped == {}
    before = fingerprint(model)
    got, wanted = outputs(result.model, X), expected(model.inner.kernel.detach(), X)
    assert (got - wanted).norm() < 2e-4 * wanted.norm()
    assert (outputs(model, X) - wanted).norm() > 1e-3 * wanted.norm()
    assert fingerprint(model) == before


def test_names_count_the_calls_in_a_module_and_not_those_of_the_modules_inside():
    def run(net, x):
        y = net.fc(x @ x.mT @ x) @ net.kernel
        return net.deeper(y) @ net.kernel

    deeper = Net(lambda net, x: x @ net.fc(x).mT @ x, fc=nn.Linear(8, 8))
    model = block(run, fc=nn.Linear(8, 8), deeper=deeper)
    result = quantize(model, [X], **OPTIONS)
    pairs = [f"{module}:matmul.{k}.{name}" for module in ("inner", "inner.deeper") for k in (0, 1)
             for name in ("input", "other")]  # fmt: skip
    layers = ["first", "inner.fc", "inner.deeper.fc", "last"]
    assert result.thresholds.keys() == {*layers, *pairs, "inner:matmul.2.input", "inner:matmul.3.input"}
    amax = float(outputs(model.first, X).abs().max())
    assert result.thresholds["inner:matmul.0.input"].amax == pytest.approx(amax)


def test_products_of_constants_and_excluded_products_inside_do_not_move_the_names():
    child = Net(lambda net, x: 10 * x @ x.mT @ x)
    model = block(lambda net, x: net.child(x) @ (net.kernel @ net.kernel) @ net.kernel, child=child)
    every, some = (quantize(model, [X], exclude=names, **OPTIONS).thresholds for names in ((), "inner.child:*"))
    layers = {"first", "last"}
    assert some.keys() - layers == {"inner:matmul.1.input", "inner:matmul.2.input"}
    assert [some[name].amax for name in some] == [every[name].amax for name in some]
    y = outputs(child, outputs(model.first, X))
    assert some["inner:matmul.1.input"].amax == pytest.approx(float(y.abs().max()), rel=1e-4)


def test_an_excluded_function_does_not_move_the_next_one():
    model = block(lambda net, x: F.linear(F.linear(x, net.other), net.kernel))
    model.inner.other = nn.Parameter(torch.eye(8) * 3)
    found = quantize(model, [X], exclude="inner:linear.0", **OPTIONS)
    x = outputs(model.first, X)
    assert found.thresholds["inner:linear.1.input"].amax == pytest.approx(3 * float(x.abs().max()), rel=1e-5)
    model.first = model.last = nn.Identity().eval()
    found = quantize(model, [X], exclude="inner:linear.0", **OPTIONS).model
    wanted = rounded(3 * X) @ rounded_weight(model.inner.kernel.detach(), 0).T
    assert (outputs(found, X) - wanted).norm() < 2e-4 * wanted.norm()


def test_options_take_the_name_of_the_call_or_of_an_operand():
    model = block(lambda net, x: x @ x.mT @ x)
    result = quantize(model, [X], exclude="inner:matmul.1", overrides={"inner:matmul.0": {"num_bits": 5}}, **OPTIONS)
    names = {name: found.num_bits for name, found in result.thresholds.items()}
    assert names == {"first": 8, "inner:matmul.0.input": 5, "inner:matmul.0.other": 5, "last": 8}
    one = quantize(model, [X], overrides={"inner:matmul.0.other": {"num_bits": 5}}, **OPTIONS).thresholds
    assert [one[f"inner:matmul.0.{name}"].num_bits for name in ("input", "other")] == [8, 5]


def test_a_saved_calibration_rounds_the_same_operands(tmp_path):
    model = block(CASES["attention"][0])
    result = quantize(model, [X], **OPTIONS)
    result.calibration.save(tmp_path / "found.npz")
    again = requantize(model, Calibration.load(tmp_path / "found.npz"))
    assert again.thresholds.keys() == result.thresholds.keys()
    assert is_same(outputs(again.model, X), outputs(result.model, X))


def test_a_simulation_can_be_copied_and_its_signature_is_that_of_the_model():
    class Named(nn.Module):
        def forward(self, x, *, shift=0):
            return x @ x.mT + shift

    result = quantize(Named().eval(), [X], **OPTIONS)
    assert list(result.thresholds) == [":matmul.0.input", ":matmul.0.other"]
    twin = copy.deepcopy(result.model)
    assert is_same(outputs(twin, X), outputs(result.model, X))
    assert twin.forward.module is twin
    assert list(inspect.signature(twin.forward).parameters) == ["x", "shift"]
    twin.load_state_dict(result.model.state_dict())


def test_a_simulation_whose_root_multiplies_can_be_exported_by_torch():
    model = quantize(ready(Net(lambda net, x: x @ net.fc(x).mT, fc=nn.Linear(8, 8)), dtype=torch.float32), [X]).model
    program = torch.export.export(model, (X,)).module()
    torch.testing.assert_close(outputs(program, X), outputs(model, X))


def test_layers_inside_are_called_as_before_and_other_calls_stay_in_float():
    """More calls than on the first batch have no range."""
    model = block(lambda net, x: x @ x.mT @ x if len(x) > 2 else (x @ x.mT @ x) @ x.mT @ x)
    model.last = nn.Identity().eval()
    result = quantize(model, [X], **OPTIONS)
    assert isinstance(vars(result.model.inner)["forward"], Routed)
    expected = outputs(model, X[:2])
    assert 0 < (outputs(result.model, X[:2]) - expected).norm() < 0.1 * expected.norm()


def test_an_error_in_a_module_leaves_no_router_behind():
    def run(net, x):
        y = x @ x.mT
        if len(x) == 1:
            raise Broken
        return y @ x

    result = quantize(block(run), [X], **OPTIONS)
    expected = outputs(result.model, X)
    with pytest.raises(Broken):
        outputs(result.model, X[:1])
    assert is_same(outputs(result.model, X), expected)
    assert torch.overrides._get_current_function_mode_stack() == []


def test_a_weight_that_a_layer_and_a_function_share_stays_in_float_for_the_function():
    model = block(lambda net, x: F.linear(net.fc(x), net.fc.weight), fc=nn.Linear(8, 8))
    found = examine(model, X)
    assert found.products == []
    assert found.skipped == {"inner": "linear computes in floating point"}


WEIGHTS = {
    "weight": lambda net: net.fc.weight,
    "view": lambda net: net.fc.weight.view(8, 8, 1)[..., 0],
    "several": lambda net: torch.cat([net.fc.weight[:4], net.other.weight[:4]]),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_layers_whose_weights_only_an_observed_function_reads_are_not_named_as_never_called(name):
    layers = {"fc": nn.Linear(8, 8)} | ({"other": nn.Linear(8, 8)} if name == "several" else {})
    model = block(lambda net, x: F.linear(x, WEIGHTS[name](net), net.fc.bias), **layers)
    result = quantize(model, [X], **OPTIONS)
    assert result.skipped == requantize(model, result.calibration).skipped == {}
    assert result.weight_scales.keys() == {"first", "last", *(f"inner.{layer}" for layer in layers)}
    assert "inner:linear.0.input" in result.thresholds


def test_layers_whose_weights_a_function_in_floating_point_reads_say_so():
    model = block(lambda net, x: F.bilinear(x, x, net.fc.weight[:, :, None].expand(8, 8, 8)), fc=nn.Linear(8, 8))
    with pytest.warns(CalibrationWarning) as warnings:
        result = quantize(model, [X], **OPTIONS)
    reason = "it was not called, but other functions read its weights"
    assert result.skipped == {"inner": "bilinear computes in floating point", "inner.fc": reason}
    assert f"layer `inner.fc` stays in floating point: {reason}" in [str(one.message) for one in warnings]


def test_attention_with_masks_groups_and_a_scale_computes_the_same_through_its_taps():
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    mask[2] = False  # a row that is masked throughout
    calls = [
        {"is_causal": True}, {"attn_mask": mask}, {"attn_mask": batch(6, 6, dtype=torch.float32)}, {"scale": 0.2},
        {"enable_gqa": True},
    ]  # fmt: skip

    def run(net, x):
        q = x.unflatten(-1, (4, 2)).transpose(1, 2)
        parts = [F.scaled_dot_product_attention(q, q[:, :2], q[:, 2:], **one) if "enable_gqa" in one else
                 F.scaled_dot_product_attention(q, q + 1, q - 1, **one) for one in calls]  # fmt: skip
        return sum(parts).transpose(1, 2).flatten(2)

    model = block(run)
    found = examine(model, X)
    assert [product[:3] for product in found.products] == [
        ("inner", "scaled_dot_product_attention", k) for k in range(5)
    ]
    taps = apply_folds(model, found.folds, products=found.products)
    torch.testing.assert_close(outputs(taps, X), outputs(model, X))


def test_a_container_that_multiplies_itself_is_named_with_the_function():
    class Odd(nn.Sequential):
        def forward(self, x):
            for layer in self:
                x = layer(x) @ x.mT @ x
            return x

    found = examine(ready(Odd(nn.Linear(8, 8)), dtype=torch.float32), X)
    assert (found.products, found.skipped) == ([], {"": "matmul computes in floating point"})


def test_products_are_diagnosed_and_corrected_along_with_layers():
    quantizer = Quantizer(block(CASES["attention"][0]), num_bins=255)
    quantizer.fold(X)
    quantizer.quantize_weights()
    quantizer.collect_amax([X])
    quantizer.collect_histograms([X])
    quantizer.search_thresholds(criterion="auto", batches=[X])
    rows = {layer.name: layer for layer in quantizer.diagnose([X]).layers}
    assert rows.keys() == quantizer.simulate().thresholds.keys()
    assert rows["inner:scaled_dot_product_attention.0.query"].activation_sqnr_db > 30
    corrected = quantizer.correct_bias(quantizer.simulate(), [X])
    assert corrected.thresholds.keys() == rows.keys()


def test_products_in_a_record_are_strings_and_numbers():
    (product,) = examine(block(CASES["linear"][0]), X).products
    assert product == Product("inner", "linear", 0, "input", "inner.kernel")
    assert product.names == ["inner:linear.0.input"]
