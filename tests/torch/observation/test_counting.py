import numpy as np
import pytest
import torch

import klquant
from klquant.backends.collection import Bins
from klquant.backends.torch.observation import counting
from klquant.backends.torch.observation.counting import count, extremes
from support.networks import batch

NUM_BINS = 301
X = batch(4000, dtype=torch.float32)


@pytest.fixture(params=["host", "device"])
def place(request, monkeypatch):
    """Count on the host, and as on a device."""
    if request.param == "device":
        monkeypatch.setattr(counting, "_ON_DEVICE", ("cpu",))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("amax", [0.7, 3.0, 4.5])
@pytest.mark.usefixtures("place")
def test_counts_are_those_of_the_core_also_as_a_device_makes_them(dtype, amax):
    x = torch.cat([X, torch.tensor([amax, -amax, 0.0, -0.0, amax / NUM_BINS, -3 * amax / NUM_BINS])]).to(dtype)
    expected = klquant.histogram(x.to(torch.promote_types(dtype, torch.float32)).numpy(), num_bins=NUM_BINS, amax=amax)
    assert count(x, Bins(NUM_BINS, amax)).counts.tolist() == expected.hist.tolist()


@pytest.mark.parametrize("level", [-9, -1, 0, 2, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_device_counts_levels_as_the_host_does(level, dtype, monkeypatch):
    x, bins = (X * 3.0 ** (level - 1)).to(dtype), Bins(3 * NUM_BINS, 3.0**level, level)
    expected = count(x, bins)
    assert expected.zeros == (x == 0).sum()
    monkeypatch.setattr(counting, "_ON_DEVICE", ("cpu",))
    found = count(x, bins)
    assert (found.counts.tolist(), found.zeros) == (expected.counts.tolist(), expected.zeros)


@pytest.mark.parametrize("num_bins", [32767, 32769])
def test_a_device_counts_into_many_bins(num_bins, monkeypatch):
    expected = klquant.histogram(X.numpy(), num_bins=num_bins, amax=2.5).hist
    monkeypatch.setattr(counting, "_ON_DEVICE", ("cpu",))
    assert count(X, Bins(num_bins, 2.5)).counts.tolist() == expected.tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bins", [Bins(NUM_BINS, 2.5), Bins(NUM_BINS, 3.0, 1)])
def test_counts_on_a_gpu_are_those_on_the_cpu(bins):
    found, expected = count(X.cuda(), bins), count(X, bins)
    assert (found.counts.tolist(), found.zeros) == (expected.counts.tolist(), expected.zeros)


def test_extremes_are_of_the_values_and_nan_if_there_is_one():
    assert extremes(torch.tensor([[-3.0, 1.0]])) == (-3.0, 1.0)
    assert extremes(torch.zeros(0, 4)) == (np.inf, -np.inf)
    assert np.isnan(extremes(torch.tensor([1.0, float("nan")]))).all()
