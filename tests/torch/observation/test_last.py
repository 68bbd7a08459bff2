import torch

from klquant.backends.torch import Quantizer
from klquant.backends.torch.observation import last
from klquant.backends.torch.observation.counting import look_on_host
from klquant.backends.torch.observation.host_counting import Buffers
from support.networks import batch
from support.zoo import load

X = batch(4, 8, dtype=torch.float32)


def test_one_tensor_is_looked_at_once(monkeypatch):
    looked = []
    monkeypatch.setattr(
        last, "look_on_host", lambda tensor, *rest: looked.append(tensor) or look_on_host(tensor, *rest)
    )
    model, batches = load("multihead_attention", torch.float32)
    quantizer = Quantizer(model, num_bins=255)
    quantizer.fold(batches[0])
    quantizer.quantize_weights()
    amax = quantizer.collect_amax(batches[:1])
    quantizer.collect_histograms(batches[:1])
    assert len(amax) == 4 + 1 + 4  # projections, the head, the operands of both products
    assert len(looked) == len(amax) - 2  # q, k and v take one tensor


def test_a_tensor_that_was_written_to_is_another():
    seen, x = last.Last(Buffers()), X.clone()
    before = seen.extremes(x)
    assert seen.extremes(x.detach()) == before
    x.mul_(2)
    assert seen.extremes(x.detach()) == (2 * before[0], 2 * before[1])


def test_a_view_and_another_tensor_are_others():
    seen = last.Last(Buffers())
    for x in (X, X[:2], X[:, :4], X.T, X.double(), X + 1):
        assert seen.extremes(x) == (float(x.min()), float(x.max()))


def test_inference_mode_is_no_obstacle():
    with torch.inference_mode():
        x = X + 1
        seen = last.Last(Buffers())
        assert seen.extremes(x) == (float(x.min()), float(x.max()))
        x.mul_(2)
        assert seen.extremes(x) == (float(x.min()), float(x.max()))
