import math

import numpy as np
import pytest
import torch

import klquant
from klquant.backends.collection import Bins, count
from klquant.backends.torch.observation import counting, host_counting
from klquant.backends.torch.observation.counting import extremes, look_on_host
from klquant.backends.torch.observation.host_counting import Buffers
from support.networks import batch

X = batch(2003, 4, dtype=torch.float32).reshape(-1)
X[::7] = 0
CASES = {"both signs": X, "after a ReLU": X.relu(), "negative": -X.abs(), "minus zero": -0.0 * X, "wide": X * 3e37}
BINS = [Bins(3, 1.0), Bins(301, 0.7), Bins(4001, 3.0), Bins(903, 3.0, 1), Bins(903, 1 / 3, -1)]


@pytest.fixture(params=[1, 2, 3])
def buffers(request, monkeypatch):
    """Return buffers for chunks of 64 values and a number of threads, which shares out the rows unevenly."""
    monkeypatch.setattr(host_counting, "_ROW", 64)
    monkeypatch.setattr(counting, "_PART", 64)
    memory = Buffers()
    memory.threads = request.param
    return memory


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
@pytest.mark.parametrize("bins", BINS)
def test_threads_count_as_the_host_does(values, bins, buffers):
    found, expected = look_on_host(values, bins, buffers), count(values.numpy(), bins)
    assert found.counted.counts.tolist() == expected.counts.tolist()
    assert found[:2] + found.counted[1:] == (float(values.min()), float(values.max()), expected.zeros)


STRIDED = {
    "axes in another order": X.reshape(2003, 4).T,
    "channels last": X[:1920].reshape(4, 6, 8, 10).to(memory_format=torch.channels_last),
    "a slice": X.reshape(2003, 4)[:, 1:],
    "heads of attention": X[:7680].reshape(8, 20, 3, 4, 4).permute(2, 0, 3, 1, 4)[1],
    "repeated": X[:300, None].expand(300, 5),
    "one long row": X[None, ::2],
    "a number": X[3],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tensor", STRIDED.values(), ids=STRIDED)
def test_strides_and_types_do_not_matter(tensor, dtype, buffers):
    values = tensor.to(dtype)
    found = look_on_host(values, Bins(301, 2.0), buffers)
    expected = count(values.to(torch.promote_types(dtype, torch.float32)).numpy(), Bins(301, 2.0))
    assert found.counted.counts.tolist() == expected.counts.tolist()
    assert found.counted.zeros == expected.zeros
    assert found[:2] == extremes(values) == (float(values.min()), float(values.max()))


def test_buffers_are_used_again(buffers):
    for values in (X[:50], X, X[:50], X.relu()):
        found = look_on_host(values, Bins(301, 2.0), buffers)
        assert found.counted.counts.tolist() == count(values.numpy(), Bins(301, 2.0)).counts.tolist()


def test_values_on_edges_are_counted_as_the_core_counts_them(buffers):
    edges = klquant.histogram(np.zeros(0), num_bins=4001, amax=1.7).edges.astype(np.float32)
    values = np.concatenate([edges, np.nextafter(edges, np.float32(-9)), np.nextafter(edges, np.float32(9))])
    expected = klquant.histogram(values, num_bins=4001, amax=1.7).hist
    found = look_on_host(torch.from_numpy(values), Bins(4001, 1.7), buffers)
    assert found.counted.counts.tolist() == expected.tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_counted(bad, buffers):
    values = X.clone()
    values[1500] = bad
    low, high, counted = look_on_host(values, Bins(301, 2.0), buffers)
    assert not math.isfinite(high - low)
    assert not counted.counts.size


def test_buffers_made_in_inference_mode_serve_outside_of_it(buffers):
    for mode in (True, False):
        with torch.inference_mode(mode):
            assert look_on_host(X + 1, Bins(301, 4.0), buffers).counted.counts.sum() == len(X)


def test_large_buffers_are_zeroed_and_do_not_overlap():
    memory = Buffers()
    chunk = memory.chunk(2**17)
    assert chunk.wide.data_ptr() == chunk.numbers.data_ptr()
    assert chunk.is_nonzero.data_ptr() == chunk.wide.data_ptr() + 8 * 2**17
    assert not memory.table(2**16).any()
