"""``smooth``: it keeps the function of the float model, and INT8 loses less where few channels are far larger."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from klquant.backends.torch import auto, compare, export_onnx, quantize, smooth, tune
from klquant.backends.torch.correction.smooth_quant import ScaledLinear
from klquant.errors import InvalidInputError

WIDTH = 32


class OffsetNorm(nn.Module):
    """Scales by 1 + weight, as Gemma's norms do: dividing the weight is not dividing the output."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class Block(nn.Module):
    """Two linear layers behind a norm; with `residual` something else reads the norm, too, as in BERT."""

    def __init__(self, norm, residual=False):
        super().__init__()
        self.norm, self.residual = norm, residual
        self.up, self.gate, self.down = nn.Linear(WIDTH, 64), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def __len__(self):
        return 0  # a model may be false

    def forward(self, x):
        x = self.norm(x)
        y = self.down(torch.relu(self.up(x)) * torch.sigmoid(self.gate(x)))
        return torch.tanh(x) + y if self.residual else y


def uneven(model):
    """Make a few channels of the norm 60 times as large as the others, and as important."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        for norm in (
            module for module in model.modules() if isinstance(module, (nn.LayerNorm, nn.RMSNorm, OffsetNorm))
        ):
            norm.weight.copy_(torch.ones(WIDTH))
            norm.weight[:3] = 60
        for layer in (module for module in model.modules() if isinstance(module, nn.Linear)):
            if layer.in_features == WIDTH:
                layer.weight[:, :3] /= 60
    return model.eval()


X = [torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(k)) for k in range(8)]
MODELS = {
    "LayerNorm": lambda: Block(nn.LayerNorm(WIDTH)),
    "RMSNorm": lambda: Block(nn.RMSNorm(WIDTH)),
    "residual": lambda: Block(nn.LayerNorm(WIDTH), residual=True),
    "offset": lambda: Block(OffsetNorm()),
}


def sqnr(model, reference):
    return compare(reference, quantize(model, X[:6]).model, X[6:]).sqnr_db


@pytest.mark.parametrize("kind", MODELS)
def test_int8_gains_and_the_float_function_stays(kind):
    model = uneven(MODELS[kind]())
    before = copy.deepcopy(model.state_dict())
    smoothed = smooth(model, X[:6])
    with torch.no_grad():
        for x in X:
            torch.testing.assert_close(smoothed(x), model(x), rtol=1e-4, atol=1e-3)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert sqnr(smoothed, model) > sqnr(model, model) + 6
    scaled = {name for name, module in smoothed.named_modules() if isinstance(module, ScaledLinear)}
    assert scaled == (set() if kind.endswith("Norm") else {"up", "gate"})  # a norm takes the factors up if it can
    assert smoothed.up.in_features == WIDTH


def test_alpha_is_that_of_the_paper():
    model = uneven(MODELS["LayerNorm"]())
    smoothed = smooth(model, X, alpha=0.5)
    with torch.no_grad():
        largest = torch.cat([model.norm(x) for x in X]).abs().amax(0)
    weights = torch.cat([model.up.weight, model.gate.weight]).detach().abs().amax(0)
    factors = (largest / weights).sqrt()
    factors /= factors.log().mean().exp()
    torch.testing.assert_close(model.norm.weight / smoothed.norm.weight, factors, rtol=1e-4, atol=0)
    torch.testing.assert_close(smoothed.up.weight / model.up.weight, factors.expand(64, -1), rtol=1e-4, atol=0)


def test_layers_that_are_called_twice_share_weights_or_follow_relu_are_left_alone():
    model = uneven(Block(nn.LayerNorm(WIDTH), residual=True))
    twice = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    twice = nn.Sequential(twice[0], twice[1], twice[0], twice[1])
    shared = Block(nn.LayerNorm(WIDTH))
    shared.gate.weight = shared.up.weight
    relu = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    for one, layer in ((uneven(twice), "1"), (uneven(shared), "up"), (uneven(relu), "2")):
        kept = one.get_submodule(layer)
        assert torch.equal(smooth(one, X).get_submodule(layer).weight, kept.weight)
    assert isinstance(smooth(model, X).up, ScaledLinear)


def test_the_engine_computes_what_the_simulation_does():
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript", reason="needs torch.onnx")
    result = quantize(smooth(uneven(MODELS["residual"]()), X), X)
    written = export_onnx(result, (X[0],), engine="tensorrt")
    session = onnxruntime.InferenceSession(written.model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: X[0].numpy()})[0]
    with torch.no_grad():
        expected = result.model(X[0]).numpy()
    assert np.abs(found - expected).max() < 0.01 * np.abs(expected).max()


def test_auto_and_tune_try_it_where_there_is_a_norm():
    model = uneven(MODELS["residual"]())
    found = auto(model, X, target="99dB", progress=False)
    assert any(one.what.endswith("+ smooth") for one in found.attempts)
    assert "smooth" in found.best.what
    tuned = tune(model, X, target="99dB", max_runs=9, min_int8=1.0, progress=False)
    assert "smooth" in tuned.trace.best.recipe.steps
    again = quantize(tuned.model, X[:3] + X[4:7], criterion=tuned.trace.best.recipe.criterion)
    assert again.calibration.model == tuned.calibration.model
    plain = tune(nn.Sequential(nn.Linear(WIDTH, WIDTH)).eval(), X, target="1dB", progress=False)
    assert plain.model is None


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        (X, {"alpha": 2}, "`alpha` must be in 0 .. 1, got 2"),
        ([], {}, "expected at least one batch, got none"),
        ([X[0], X[0] * torch.nan], {}, "layer `up`, batch 1: values must be finite, got NaN or infinity"),
        (iter(X), {}, "a list or a DataLoader"),
    ],
)
def test_what_cannot_be_done_is_refused(batches, options, message):
    with pytest.raises(InvalidInputError, match=message):
        smooth(uneven(MODELS["LayerNorm"]()), batches, **options)
