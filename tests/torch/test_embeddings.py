"""Tables of embeddings in INT8, as engines have them."""

import numpy as np
import pytest
import torch
from torch import nn

import klquant
from klquant.backends.onnx.qdq import embeddings as onnx_rules
from klquant.backends.torch import embeddings, export_onnx, quantize, round_embeddings, saturate_like_engines
from klquant.errors import InvalidInputError
from support.networks import Net, is_same, outputs, ready
from support.onnx_models import run

pytestmark = pytest.mark.filterwarnings("ignore::klquant.errors.CalibrationWarning")
WORDS = [torch.randint(0, 1024, (4, 6), generator=torch.Generator().manual_seed(k)) for k in range(3)]


class Unusual(nn.Embedding):
    def forward(self, x):
        return 2 * super().forward(x)


def network(table):
    """Return a network with a table, whose head shares it if it is large enough."""
    head = nn.Linear(table.embedding_dim, 1024, bias=False)
    model = ready(Net(lambda net, ids: net.head(net.table(ids).tanh()), table=table, head=head), dtype=torch.float32)
    if table.weight.shape == head.weight.shape:
        head.weight = table.weight
    return model


def test_a_table_has_one_scale_for_each_element_and_the_layer_that_shares_it_keeps_its_own():
    model = network(nn.Embedding(1024, 16))
    simulated = quantize(model, WORDS, num_bins=255).model
    rounded, before = round_embeddings(simulated), simulated.table.weight.numpy(force=True)
    scale = (np.abs(before).max(0) / np.float32(127)).astype(np.float32)
    expected = klquant.fake_quantize(before, scale, axis=1)
    assert np.array_equal(rounded.table.weight.numpy(), expected)
    assert not np.array_equal(expected, before)
    assert is_same(rounded.head.weight, simulated.head.weight)
    assert is_same(simulated.table.weight.detach(), model.table.weight.detach())
    assert not is_same(outputs(rounded, WORDS[0]), outputs(simulated, WORDS[0]))


@pytest.mark.parametrize("table", [nn.Embedding(1023, 16), nn.Embedding(2048, 15), nn.Embedding(1024, 16, max_norm=1.0),
                                   Unusual(1024, 16)])  # fmt: skip
def test_other_tables_stay_in_floating_point(table):
    simulated = quantize(network(table), WORDS, num_bins=255, forward=lambda net, x: net(x.clamp(max=1022))).model
    assert is_same(round_embeddings(simulated).table.weight.detach(), simulated.table.weight.detach())


def test_onnxruntime_computes_the_same():
    result = quantize(network(nn.Embedding(1024, 16)), WORDS, num_bins=255)
    exported = export_onnx(result, WORDS[0], engine="onnxruntime")
    assert any(node.op_type == "DequantizeLinear" and "gather" in node.input[0] for node in exported.model.graph.node)
    simulated = round_embeddings(saturate_like_engines(result.model))
    (got,) = run(exported.model, **{exported.model.graph.input[0].name: WORDS[1].numpy()}).values()
    expected = outputs(simulated, WORDS[1])
    assert (torch.from_numpy(got) - expected).abs().max() < 0.02 * expected.abs().max()  # its output is rounded too


def test_the_rules_are_those_of_the_export():
    assert (embeddings.MIN_WIDTH, embeddings.MIN_SIZE) == (onnx_rules.MIN_WIDTH, onnx_rules.MIN_SIZE)


def test_only_a_simulated_model_is_rounded():
    with pytest.raises(InvalidInputError, match="must be the result of simulate"):
        round_embeddings(network(nn.Embedding(1024, 16)))
