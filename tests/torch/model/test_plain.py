"""Modules that compute what a plain layer computes become that layer, in a copy."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from klquant.backends.torch import Quantizer, examine, quantize, requantize
from klquant.backends.torch.model.layers import SameConv2d, weighted_layers
from klquant.backends.torch.model.plain import NormActivation, make_plain, plain_copy
from klquant.errors import InvalidInputError
from support.networks import Net, batch, fingerprint, is_same, outputs, ready

pytestmark = pytest.mark.filterwarnings("ignore:layer `[^`]*`. (T =|expected SQNR):klquant.errors.CalibrationWarning")
X = batch(2, 4, 9, 9)


class Standardized(nn.Conv2d):
    """Computes its weight when it is called, as timm's StdConv2d."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Same(nn.Conv2d):
    """Pads as TensorFlow does, as timm's Conv2dSame."""

    def forward(self, x):
        pads = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            missing = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [missing // 2, missing - missing // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Louder(nn.Linear):
    """Takes more than its input, as a layer with an adapter does."""

    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


class Branching(nn.Linear):
    def __init__(self, inputs, outputs, *, limit, above):
        super().__init__(inputs, outputs)
        self.limit, self.above = limit, above

    def forward(self, x):
        return super().forward(x) * (2 if (x.abs().max() > self.limit) == self.above else 1)


class Cast(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class Scaled(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight) * 2 + self.bias


class Twice(nn.Linear):
    def forward(self, x):
        return F.linear(F.linear(x, self.weight, self.bias), self.weight, self.bias)


class NormAct(nn.BatchNorm2d):
    """Normalizes and activates, as timm's BatchNormAct2d."""

    def __init__(self, channels, act):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x):
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return self.act(self.drop(x))


class NormTwice(NormAct):
    def forward(self, x):
        return super().forward(x) * 2


class Conv1D(nn.Module):
    """A linear layer with its weight the other way round, as in transformers."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


def old(norm, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # both are deprecated, and models hold them
        return norm(nn.Conv2d(4, 4, 3), **options)


PLAIN = {
    "computed weight": (Standardized(4, 4, 3, stride=2, bias=True), nn.Conv2d),
    "same padding": (Same(4, 4, 3, stride=2), SameConv2d),
    "same padding, uneven": (Same(4, 4, (5, 2), stride=(3, 2)), SameConv2d),
    "cast": (Cast(9, 4), nn.Linear),
    "conv1d": (Conv1D(9, 4), nn.Linear),
    "weight norm": (parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), nn.Conv2d),
    "spectral norm": (parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)), nn.Conv2d),
    "old weight norm": (old(nn.utils.weight_norm), nn.Conv2d),
    "old spectral norm": (old(nn.utils.spectral_norm), nn.Conv2d),
    "pruned": (prune.l1_unstructured(nn.Conv2d(4, 4, 3), "weight", amount=0.3), nn.Conv2d),
    "pruned bias": (prune.l1_unstructured(nn.Conv2d(4, 4, 3), "bias", amount=0.3), nn.Conv2d),
}


@pytest.mark.parametrize("case", PLAIN)
def test_a_layer_with_the_same_results_takes_its_place(case):
    layer, kind = PLAIN[case]
    model = ready(nn.Sequential(layer))
    expected, before, keys = outputs(model, X), fingerprint(model), list(model.state_dict())
    plain = plain_copy(model)
    assert type(plain[0]) is kind
    assert [name for name, _ in weighted_layers(plain)] == ["0"]
    torch.testing.assert_close(outputs(plain, X), expected)
    copy.deepcopy(plain)
    assert (fingerprint(model), list(model.state_dict())) == (before, keys)
    assert is_same(outputs(model, X), expected)


@pytest.mark.parametrize("odd", [Scaled(9, 9), Twice(9, 9)])
def test_a_layer_that_computes_more_stays_and_its_functions_are_quantized(odd):
    model = ready(nn.Sequential(odd), dtype=torch.float32)
    assert type(plain_copy(model)[0]) is type(odd)
    result = quantize(model, [X.float()])
    assert list(result.thresholds) == [f"0:linear.{k}.input" for k in range(2 if isinstance(odd, Twice) else 1)]
    assert (
        0
        < (outputs(result.model, X.float()) - outputs(model, X.float())).norm()
        < 0.1 * outputs(model, X.float()).norm()
    )


@pytest.mark.parametrize("act", [nn.ReLU(), nn.SiLU()])
def test_a_norm_with_an_activation_is_folded_and_the_activation_stays(act):
    model = ready(nn.Sequential(nn.Conv2d(4, 4, 3), NormAct(4, act), nn.Conv2d(4, 2, 1)), dtype=torch.float32)
    found = examine(model, X.float())
    assert [(fold.module, fold.into) for fold in found.folds if fold.kind == "batch_norm"] == [("1.norm", "0")]
    assert any(fold.kind == "relu" for fold in found.folds) == isinstance(act, nn.ReLU)
    plain = plain_copy(model)
    assert isinstance(plain[1], NormActivation)
    assert is_same(outputs(plain, X.float()), outputs(model, X.float()))
    assert plain[1].eps == model[1].eps
    assert quantize(model, [X.float()]).skipped == {}


def test_a_norm_that_computes_more_stays():
    assert type(plain_copy(ready(NormTwice(4, nn.ReLU())))) is NormTwice


def test_users_name_the_layers_that_take_the_place_of_their_classes():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 9))

        def forward(self, x):
            return torch.tensordot(x, self.kernel, ([-1], [-1]))

    def convert(odd):
        layer = nn.Linear(9, 4, bias=False)
        layer.weight = odd.kernel
        return layer

    model = ready(nn.Sequential(Odd()), dtype=torch.float32)
    options = {"layer_types": {Odd: convert}, "num_bins": 255}
    result = quantize(model, [X.float()], **options)
    assert list(result.thresholds) == ["0"]
    again = requantize(model, result.calibration, layer_types=options["layer_types"])
    assert is_same(outputs(again.model, X.float()), outputs(result.model, X.float()))
    with pytest.raises(InvalidInputError, match="`layer_types` must return a module for `0`"):
        Quantizer(model, layer_types={Odd: lambda odd: None}).fold(X.float())


def test_replacements_that_compute_something_else_are_refused():
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x).sin()

    class Random(Odd):
        def forward(self, x):
            return super().forward(x) + torch.randn(())

    def plain(odd):
        layer = nn.Linear(9, 4)
        layer.weight, layer.bias = odd.weight, odd.bias
        return layer

    types = {Odd: plain, Random: plain}
    with pytest.raises(InvalidInputError, match=r"`layer_types` must return modules that compute .* Odd, Random"):
        Quantizer(ready(nn.Sequential(Odd(9, 4))), layer_types=types).fold(X)
    Quantizer(ready(nn.Sequential(Random(9, 4))), layer_types=types).fold(X)  # cannot be told


@pytest.mark.parametrize("given", [(), (0.5,), {"scale": 0.5}], ids=str)
def test_a_subclass_whose_forward_takes_more_is_quantized_by_its_function(given):
    args, kwargs = (given, {}) if isinstance(given, tuple) else ((), given)
    model = ready(Net(lambda net, x: net.fc(x, *args, **kwargs), fc=Louder(9, 4)), dtype=torch.float32)
    result = quantize(model, [X.float()], num_bins=255)
    assert list(result.thresholds) == ["fc:linear.0.input"]
    assert not result.skipped
    assert torch.allclose(outputs(result.model, X.float())[0], outputs(model, X.float())[0], atol=0.1)


@pytest.mark.parametrize(("limit", "above"), [(50, True), (0.5, False)])
def test_a_layer_that_branches_on_the_size_of_its_input_is_left_alone(limit, above):
    layer = Branching(9, 4, limit=limit, above=above)
    assert type(plain_copy(Net(None, fc=layer).eval()).fc) is Branching


def test_hooks_and_a_replaced_forward_forbid_it():
    hooked, patched = Standardized(4, 4, 3), Standardized(4, 4, 3)
    hooked.register_forward_hook(lambda module, args, y: y + 1)
    patched.forward = lambda x: x
    model = make_plain(nn.Sequential(hooked, patched).eval())
    assert [type(module) for module in model] == [Standardized, Standardized]


def test_the_weights_of_a_frozen_layer_stay_frozen():
    layer = Cast(9, 4).requires_grad_(requires_grad=False)
    assert not plain_copy(Net(None, fc=layer).eval()).fc.weight.requires_grad
