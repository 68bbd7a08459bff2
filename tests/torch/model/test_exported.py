"""Modules of torch.export: their operations become layers."""

import pytest
import torch
from torch import nn

from klquant.backends.torch import quantize
from klquant.errors import InvalidInputError
from support.networks import batch, outputs, ready

pytestmark = [
    pytest.mark.filterwarnings("ignore:layer `[^`]*`. (T =|expected SQNR):klquant.errors.CalibrationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch.export's own
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
X = batch(4, 3, 8, 8, dtype=torch.float32)


def network():
    convs = (
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.Conv2d(4, 4, 3, groups=2, dilation=2, padding="same", bias=False),
    )
    head = nn.Flatten(), nn.Linear(64, 5)
    return nn.Sequential(convs[0], nn.BatchNorm2d(4), nn.ReLU(), convs[1], nn.BatchNorm2d(4), *head)


def exported(model):
    return torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()


def test_an_exported_program_is_quantized_like_the_model():
    model = ready(network(), dtype=torch.float32)
    program = exported(model)
    expected, result = quantize(model, [X]), quantize(program, [X])
    assert {name: found.threshold for name, found in result.thresholds.items()} == pytest.approx(
        {name: found.threshold for name, found in expected.thresholds.items()}
    )
    assert [fold for fold in result.folds if fold.kind == "batch_norm"] == [
        fold for fold in expected.folds if fold.kind == "batch_norm"
    ]
    assert result.skipped == {}
    torch.testing.assert_close(outputs(result.model, X[:3]), outputs(expected.model, X[:3]))
    torch.testing.assert_close(outputs(program, X), outputs(model, X))


def test_one_that_was_exported_in_training_mode_is_refused():
    program = exported(ready(network(), dtype=torch.float32).train())
    with pytest.raises(InvalidInputError, match="exported in eval mode, got `` with a BatchNorm in training mode"):
        quantize(program, [X])
