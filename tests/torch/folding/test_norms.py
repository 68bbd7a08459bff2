"""BatchNorms under other names: folded if they compute the same, otherwise named with a reason."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from klquant.backends.torch import fold_batch_norm, quantize
from klquant.errors import CalibrationWarning
from support.networks import Net, batch, outputs, ready

pytestmark = pytest.mark.filterwarnings("ignore:layer `[^`]*`. (T =|expected SQNR):klquant.errors.CalibrationWarning")
X = batch(2, 3, 6, 6)
REASON = "has running statistics but is no plain BatchNorm"


class Renamed(nn.BatchNorm2d):
    """Changes only how it is made."""

    def __init__(self, channels, momentum=0.03):
        super().__init__(channels, eps=1e-3, momentum=momentum)


class NormAct(nn.BatchNorm2d):
    """Normalizes and activates, as timm's BatchNormAct2d."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return self.act(x)


class Called(nn.BatchNorm2d):
    def __call__(self, x):
        return super().__call__(x) * 2


class Frozen(nn.Module):
    """Has buffers instead of parameters, as torchvision's FrozenBatchNorm2d."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.linspace(-1, 2, channels))
        self.register_buffer("bias", torch.linspace(1, -1, channels))
        self.register_buffer("running_mean", torch.linspace(-1, 1, channels))
        self.register_buffer("running_var", torch.linspace(0.5, 2, channels))

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class FrozenAct(Frozen):
    def forward(self, x):
        return super().forward(x).relu()


class FrozenInside(Frozen):
    """Keeps eps to itself, as the frozen norm of DETR in transformers."""

    def __init__(self, channels):
        super().__init__(channels)
        del self.eps

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class DeadChannels(FrozenInside):
    """Has channels that nothing reaches, one of them with the least variance."""

    def __init__(self, channels):
        super().__init__(channels)
        self.weight[0] = self.running_var[0] = self.running_var[2] = 0


class Broken(Frozen):
    def forward(self, x, mask=None):
        return super().forward(x * mask)


def patched():
    norm = nn.BatchNorm2d(4)
    norm.forward = lambda x: nn.BatchNorm2d.forward(norm, x) + 1
    return norm


def model_of(norm):
    return ready(nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 2, 1)))


NORMS = [Renamed(4), Frozen(4), Frozen(4, eps=0.3), FrozenInside(4), DeadChannels(4)]


@pytest.mark.parametrize("norm", NORMS, ids=type)
def test_what_computes_the_same_is_folded(norm):
    model = model_of(norm)
    folded, folds = fold_batch_norm(model, X)
    assert [(fold.module, fold.into, fold.reason) for fold in folds] == [("1", "0", "")]
    assert type(folded[1]) is nn.Identity
    torch.testing.assert_close(outputs(folded, X), outputs(model, X))
    assert quantize(model.float(), [X.float()]).skipped == {}


OTHERS = {
    "calls differently": lambda: Called(4),
    "frozen and activates": lambda: FrozenAct(4),
    "instance norm with statistics": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "forward is replaced": patched,
}


@pytest.mark.parametrize("case", OTHERS)
def test_others_are_named_in_the_folds_and_in_a_warning(case):
    model = model_of(OTHERS[case]()).float()
    expected = outputs(model, X.float())
    with pytest.warns(CalibrationWarning, match=f"layer `1` stays in floating point: .*{REASON}"):
        result = quantize(model, [X.float()])
    (fold,) = [fold for fold in result.folds if fold.module == "1"]
    assert REASON in fold.reason
    assert REASON in result.skipped["1"]
    assert type(model[1]).__name__ in fold.reason
    assert outputs(result.model, X.float()).sub(expected).norm() < 0.2 * expected.norm()


def test_a_norm_that_cannot_be_tried_is_named():
    model = ready(Net(lambda net, x: net.norm(net.conv(x), mask=1), conv=nn.Conv2d(3, 4, 3), norm=Broken(4)))
    _, (fold,) = fold_batch_norm(model, X)
    assert fold.module == "norm"
    assert REASON in fold.reason


def test_layers_inside_a_module_with_running_statistics_are_found():
    model = model_of(nn.BatchNorm2d(4))
    for name in ("running_mean", "running_var"):
        model.register_buffer(name, torch.zeros(3))
    _, folds = fold_batch_norm(model, X)
    assert [(fold.module, bool(fold.reason)) for fold in folds] == [("1", False), ("", True)]


def test_norms_without_statistics_are_not_named():
    _, folds = fold_batch_norm(model_of(nn.InstanceNorm2d(4)), X)
    assert folds == []
