"""On a GPU: the same counts and thresholds as on the CPU, bit for bit, where the network computes exactly."""

import pytest
import torch
from torch import distributed, nn

import klquant
from klquant.backends.collection import Bins
from klquant.backends.torch import quantize
from klquant.backends.torch.observation.counting import count, extremes
from support.networks import eighths, exact

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and this machine has none"),
    pytest.mark.filterwarnings("ignore:layer .*expected SQNR"),
]
OPTIONS = {"num_bins": 801, "criterion": "entropy"}


@pytest.fixture(autouse=True)
def float32_convolutions(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def network():
    parts = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 5)]
    return exact(nn.Sequential(*parts))


def batches(device="cpu"):
    return [eighths(8, 1, 8, 8, seed=k).to(device) for k in range(4)]


def assert_same(result, expected):
    assert result.thresholds == expected.thresholds
    for name, histogram in expected.histograms.items():
        assert result.histograms[name].hist.tolist() == histogram.hist.tolist()


@pytest.mark.parametrize("passes", [1, 2])
def test_calibration_is_that_on_the_cpu(passes):
    expected = quantize(network(), batches(), passes=passes, **OPTIONS)
    result = quantize(network().cuda(), batches("cuda"), passes=passes, **OPTIONS)
    assert_same(result, expected)
    got, wanted = result.model(batches("cuda")[0]).cpu(), expected.model(batches()[0])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)  # scales make the last product inexact


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_counts_of_every_type_are_those_on_the_cpu(dtype):
    x = torch.randn(100_001, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert extremes(x.cuda()) == extremes(x)
    for bins in (Bins(255, 2.5), Bins(2001, 2.5), Bins(8001, 2.5), Bins(2403, 3.0, 1)):
        assert count(x.cuda(), bins).counts.tolist() == count(x, bins).counts.tolist()


def test_what_is_not_finite_is_named():
    spoilt = batches("cuda")
    spoilt[2][0, 0, 0, 0] = float("nan")
    with pytest.raises(klquant.KLQuantError, match=r"batch 2|'0'"):
        quantize(network().cuda(), spoilt, **OPTIONS)


def test_a_group_over_nccl_gives_what_one_process_gives(tmp_path):
    expected = quantize(network().cuda(), batches("cuda"), **OPTIONS)
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        together = quantize(network().cuda(), batches("cuda"), process_group=distributed.group.WORLD, **OPTIONS)
    finally:
        distributed.destroy_process_group()
    assert_same(together, expected)
