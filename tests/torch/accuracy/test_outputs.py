import math

import numpy as np
import pytest
import torch
from torch import nn

import klquant
from klquant.backends.torch import auto, compare, quantize, tune
from klquant.backends.torch.accuracy.outputs import num_bytes


def network():
    """Return a network whose second layer is hard to quantize: one channel of its input is far larger than the others.

    The weights of that channel are small, so all channels matter alike in its output. No ReLU is between the layers,
    and Tanh forbids to equalize.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), Scale(), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4), nn.Linear(4, 3))
    with torch.no_grad():
        model[2].weight[:, 0] /= 300
    return model.eval()


class Scale(nn.Module):
    def forward(self, x):
        return torch.sin(x) * torch.tensor([300.0, 1, 1, 1])


MODEL = network()
X = [torch.randn(16, 6, generator=torch.Generator().manual_seed(k)) for k in range(8)]


def logits(model):
    with torch.no_grad():
        return torch.cat([model(x) for x in X]).numpy()


@pytest.fixture(scope="module")
def quantized():
    return quantize(MODEL, X, criterion="max")


def test_outputs_and_accuracy_by_hand(quantized):
    floats, others = logits(MODEL), logits(quantized.model)
    labels = floats.argmax(1)
    found = compare(MODEL, quantized.model, iter(X), labels=labels, metric=lambda a, b: len(a) + len(b))
    (output,) = found.outputs
    assert output.sqnr_db == pytest.approx(10 * np.log10((floats**2).sum() / ((floats - others) ** 2).sum()), rel=1e-5)
    assert output.top1 == output.int8_accuracy == (others.argmax(1) == labels).mean()
    assert (output.name, output.float_accuracy, found.metric, found.num_batches) == ("output", 1.0, 16, 8)
    assert found.float_ms > 0


def test_sizes_count_rounded_weights_in_their_bits(quantized):
    weights = 6 * 4 + 4 * 8 + 8 * 4 + 4 * 3
    biases = 4 + 8 + 4 + 3
    assert num_bytes(MODEL) == 4 * (weights + biases)
    assert num_bytes(quantized.model) == weights + 4 * (biases + 4)  # and a scale for each layer
    four = quantize(MODEL, X, criterion="max", num_bits=4)
    assert num_bytes(four.model) == weights / 2 + 4 * (biases + 4)


def test_several_outputs_of_low_precision_are_numbered():
    class Two(nn.Module):
        def forward(self, x):
            return {"a": x.bfloat16(), "b": (x.half(), x > 0)}

    found = compare(Two().eval(), Two().eval(), X)
    assert [output.name for output in found.outputs] == ["output 0", "output 1"]
    assert found.sqnr_db == math.inf


def test_training_mode_and_no_batches_are_refused(quantized):
    with pytest.raises(klquant.InvalidInputError, match="eval mode"):
        compare(network().train(), quantized.model, X)
    with pytest.raises(klquant.InvalidInputError, match="at least one batch"):
        compare(MODEL, quantized.model, [])


# --- tune ---


def test_the_layer_that_costs_most_is_left_out():
    found = tune(MODEL, X, target="32dB", min_int8=0.5)
    best = found.trace.best
    assert found.trace.reached
    assert found.trace.trials[0].measured.sqnr_db < 20
    assert best.recipe.exclude == ("2",)
    assert best.measured.int8_share == 0.75 == len(found.quantized.thresholds) / 4
    assert found.quantized.skipped["2"] == "excluded by the settings"
    measured = compare(MODEL, found.quantized.model, [X[3], X[7]])
    assert measured.sqnr_db == pytest.approx(best.measured.sqnr_db)
    assert math.isnan(best.measured.time_ratio)


def test_it_is_never_worse_than_its_start():
    found = tune(MODEL, X, target="200dB", max_runs=7)
    assert found.trace.best.measured.sqnr_db == max(trial.measured.sqnr_db for trial in found.trace.trials)
    assert len(found.trace.trials) == 7


def test_it_resumes(tmp_path):
    options = {"target": "32dB", "min_int8": 0.5, "resume": tmp_path / "trials.json"}
    tune(MODEL, X, **options, max_runs=2)
    whole = tune(MODEL, X, **options)
    again = tune(MODEL, X, **options)
    assert [trial.recipe for trial in again.trace.trials] == [trial.recipe for trial in whole.trace.trials]
    assert again.trace.best.measured[:2] == whole.trace.best.measured[:2]
    for model, batches in ((nn.Sequential(nn.Linear(6, 3)).eval(), X), (MODEL, X[:7])):
        with pytest.raises(klquant.InvalidInputError, match="must come from a tuning of this model, data and options"):
            tune(model, batches, **options)


class Encoder(nn.Module):
    """A linear layer; positions that only fill up a sample get large values."""

    def __init__(self, offset=9.0):
        super().__init__()
        self.linear, self.offset = nn.Linear(4, 4), offset

    def forward(self, x, attention_mask):
        return self.linear(x) + self.offset * (1 - attention_mask)[..., None]


def test_positions_that_fill_up_a_sample_do_not_count():
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batches = [{"x": torch.randn(2, 3, 4), "attention_mask": mask} for _ in range(8)]
    model, other = Encoder().eval(), Encoder(5.0).eval()
    other.linear.load_state_dict(model.linear.state_dict())
    assert compare(model, other, batches).sqnr_db == math.inf
    assert compare(model, other, [{**batches[0], "attention_mask": 0 * mask}]).sqnr_db < 20  # nothing is left out
    for found in (
        tune(model, batches, validation=batches, target="1dB", progress=False).trace.best.measured,
        auto(model, batches, validation=batches, target="1dB", max_seconds=0.001, progress=False).best,
    ):
        expected = compare(model, quantize(model, batches, criterion="entropy").model, batches).sqnr_db
        assert found.sqnr_db == pytest.approx(expected, abs=0.01)
