"""PyTorch's attention, with its projections as layers."""

import pytest
import torch
from torch import nn

from klquant.backends.torch import quantize
from klquant.backends.torch.model.plain import plain_copy
from support.networks import Net, batch, outputs, ready

pytestmark = pytest.mark.filterwarnings("ignore:layer `[^`]*`. (T =|expected SQNR):klquant.errors.CalibrationWarning")
X, Y = batch(3, 5, 8), batch(3, 7, 8, seed=1)
PADDING = torch.arange(7) >= torch.tensor([[7], [4], [5]])
FORMS = {"first": {"batch_first": True}, "plain": {}, "no bias": {"bias": False}, "other sizes": {"kdim": 6, "vdim": 4}}
CALLS = {
    "weights": {},
    "each head": {"average_attn_weights": False},
    "no weights": {"need_weights": False},
    "padding": {"key_padding_mask": PADDING},
    "added": {"attn_mask": batch(5, 7, seed=2), "need_weights": False},
    "both masks": {"attn_mask": torch.arange(7) > 2 + torch.arange(5)[:, None], "key_padding_mask": PADDING},
    "each head's mask": {"attn_mask": batch(6, 5, 7, seed=2)},
}


def attention(**options):
    return ready(nn.MultiheadAttention(8, 2, **options))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("form", FORMS)
def test_it_computes_the_same(form, call):
    model = attention(**FORMS[form])
    sizes = FORMS[form].get("kdim", 8), FORMS[form].get("vdim", 8)
    given = X, Y[..., : sizes[0]], Y[..., : sizes[1]]
    if not FORMS[form].get("batch_first"):
        given = tuple(x.transpose(0, 1) for x in given)
    expected, got = outputs(model, *given, **CALLS[call]), outputs(plain_copy(model), *given, **CALLS[call])
    torch.testing.assert_close(got, expected)


def test_it_computes_the_same_without_a_batch():
    model = attention()
    torch.testing.assert_close(outputs(plain_copy(model), X[0], Y[0], Y[0]), outputs(model, X[0], Y[0], Y[0]))


def test_the_joint_weights_stay_readable():
    model = attention(batch_first=True)
    plain = plain_copy(model)
    assert torch.equal(plain.in_proj_weight, model.in_proj_weight)
    assert torch.equal(plain.in_proj_bias, model.in_proj_bias)


def test_projections_and_products_are_quantized():
    model = Net(lambda net, x: net.attend(x, x, x, need_weights=False)[0], attend=attention(batch_first=True))
    model, x = ready(model, dtype=torch.float32), X.float()
    result = quantize(model, [x])
    names = [f"attend.{name}_proj" for name in ("q", "k", "v", "out")]
    products = [f"attend:scaled_dot_product_attention.0.{name}" for name in ("query", "key", "weights", "value")]
    assert result.thresholds.keys() == {*names, *products}
    assert result.skipped == {}
    expected = outputs(model, x)
    assert 0 < (outputs(result.model, x) - expected).norm() < 0.1 * expected.norm()


@pytest.mark.skipif(torch.__version__ < "2.10", reason="torch.compile 2.9 cannot trace zip(..., strict=False)")
def test_a_simulation_is_compiled_as_one_graph():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    result = quantize(ready(nn.Sequential(layer), dtype=torch.float32), [X.float()], num_bins=255)
    compiled = torch.compile(result.model, backend="eager", fullgraph=True)
    torch.testing.assert_close(outputs(compiled, X.float()), outputs(result.model, X.float()))
