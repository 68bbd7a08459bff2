import numpy as np
import pytest

from klquant.backends.onnx import prepare
from klquant.backends.onnx.correction.data import sampled
from support.onnx_models import build


@pytest.mark.parametrize(
    ("batches", "samples", "sizes"),
    [(2, 4, [2, 2]), (2, 100, [8, 8]), (3, 4, [2, 2, 2]), (9, 4, [1, 1, 1, 1]), (0, 4, [])],
)
def test_parts_of_some_batches_have_about_so_many_samples(batches, samples, sizes):
    prepared = prepare(build("float[n, 4] x", "float[n, 3] y", "y = MatMul (x, w)", w=(4, 3)))
    feeds = [{"x": np.full((8, 4), k, np.float32)} for k in range(batches)]
    found = sampled(prepared, feeds, 4, samples)
    assert [len(one["x"]) for one in found] == sizes
    assert [int(one["x"][0, 0]) for one in found] == [k * batches // len(sizes) for k in range(len(sizes))]


def test_batches_of_a_fixed_size_stay_whole():
    prepared = prepare(build("float[8, 4] x", "float[8, 3] y", "y = MatMul (x, w)", w=(4, 3)))
    (found,) = sampled(prepared, [{"x": np.zeros((8, 4), np.float32)}], 4, 2)
    assert len(found["x"]) == 8
