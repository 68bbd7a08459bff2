"""What is not a layer called once, in everything that reads the weights of a simulated model."""

import pytest
import torch
from torch import nn

from klquant.backends.torch import compare, freeze_weights, quantize, unfreeze_weights
from support.networks import Net, batch

pytestmark = pytest.mark.filterwarnings("ignore::klquant.errors.CalibrationWarning")
DATA = [batch(8, 6, seed=k, dtype=torch.float32) for k in range(3)]


def attention(net, x):
    scores = net.query(x) @ net.query(2 * x).T
    return scores.softmax(-1) @ net.value(x)


MODEL = Net(attention, query=nn.Linear(6, 6, bias=False), value=nn.Linear(6, 6, bias=False)).eval()
RESULT = quantize(MODEL, DATA, num_bins=401)


def test_the_points_are_calls_and_operands():
    assert {"query@0", "query@1", "value", ":matmul.0.input", ":matmul.1.other"} < RESULT.thresholds.keys()


def test_the_size_counts_each_rounded_weight_once_in_its_bits():
    found = compare(MODEL, RESULT.model, DATA[:1])
    before, after = 2 * 36 * 4, 2 * 36
    scales = 4 * sum(buffer.numel() for buffer in RESULT.model.buffers())
    assert (found.float_bytes, found.int8_bytes - scales) == (before, after)


def test_weights_are_unfrozen_trained_and_rounded_again():
    model = unfreeze_weights(RESULT.model)
    torch.testing.assert_close(model(DATA[0]), RESULT.model(DATA[0]))
    model(DATA[0]).square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert len(gradients) == 2
    assert all(one is not None and one.abs().sum() > 0 for one in gradients)
    torch.testing.assert_close(freeze_weights(model)(DATA[0]), RESULT.model(DATA[0]))


def test_a_head_can_be_tied_to_a_table_again_and_trained_with_it():
    model = Net(lambda net, ids: net.head(net.table(ids)), table=nn.Embedding(9, 6), head=nn.Linear(6, 9)).eval()
    model.head.weight, ids = model.table.weight, torch.arange(9)
    simulated = quantize(model, [ids], num_bins=401).model
    student = unfreeze_weights(simulated)
    student.head.parametrizations.weight.original = student.table.weight
    torch.testing.assert_close(student(ids), simulated(ids))
    student(ids).square().sum().backward()
    assert [parameter.shape for parameter in student.parameters()] == [(9, 6), (9,)]
    torch.optim.SGD(student.parameters(), 0.01).step()
    torch.testing.assert_close(freeze_weights(student)(ids), student(ids))
