"""``auto`` on modules: what it returns is what its parts return, measured on data that was held back."""

import copy
import math

import pytest
import torch
from torch import nn

from klquant.backends.torch import auto, compare, quantize
from klquant.errors import InvalidInputError

torch.manual_seed(0)
MODEL = nn.Sequential(
    nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
).eval()
X = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(8)]
KEPT, HELD = [X[k] for k in (0, 1, 2, 4, 5, 6)], [X[3], X[7]]


@pytest.fixture(scope="module")
def found():
    return auto(MODEL, X, target="10dB")


def test_all_criteria_and_steps_are_tried(found):
    names = [one.what for one in found.attempts]
    assert names[:5] == ["entropy", "max", "percentile", "mse", "auto"]
    assert [name.rpartition(" + ")[2] for name in names[5:]] == ["equalize", "adaround", "correct_bias"]
    assert found.reached
    assert all(one.int8_share == 1 for one in found.attempts)


def test_numbers_are_those_of_the_data_that_was_held_back(found):
    measured = compare(MODEL, found.quantized.model, HELD)
    assert found.best.sqnr_db == pytest.approx(measured.sqnr_db, abs=0.01)
    assert (found.best.num_bytes, found.float_bytes) == (measured.int8_bytes, measured.float_bytes)
    assert found.data == (6, 16, True)
    assert math.isnan(found.best.ms)
    assert "ms" not in found.verdict


def test_a_criterion_alone_gives_what_quantize_gives(found):
    expected = compare(MODEL, quantize(MODEL, KEPT, criterion="max").model, HELD).sqnr_db
    assert found.attempts[1].sqnr_db == pytest.approx(expected, abs=0.01)


def test_the_model_is_left_as_it_was(found):
    before = copy.deepcopy(MODEL.state_dict())
    auto(MODEL, X, max_seconds=0.001)
    assert all(torch.equal(before[name], value) for name, value in MODEL.state_dict().items())


def test_forward_and_metric_are_the_users():
    pairs = [(batch, torch.zeros(8)) for batch in X]
    options = {"forward": lambda model, pair: model(pair[0]), "metric": lambda floats, others: 0.5}
    found = auto(MODEL, pairs, target=0.5, max_seconds=0.001, **options)
    assert (found.reached, found.measure, found.best.agreement) == (True, "metric", 0.5)
    assert found.left_out[-1] == "correct_bias"


def test_layers_that_the_settings_exclude_count_as_floating_point():
    assert auto(MODEL, X, exclude=["6"], max_seconds=0.001).best.int8_share == pytest.approx(2 / 3)


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(InvalidInputError):
        auto(copy.deepcopy(MODEL).train(), X)
