"""Kept tensors without their zeros: the same counts, in less memory."""

import numpy as np
import pytest

from klquant.backends.collection import Bins, count
from klquant.backends.onnx.nonzeros import count_with_zeros, without_zeros

X = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32)


@pytest.mark.parametrize(
    ("tensor", "left"),
    [
        (X, X.size),
        (np.maximum(X, 0), (X > 0).sum()),
        (np.where(X > -3, X, 0), X.size),
        (np.where(X > 0, X, np.float32(-0.0)), (X > 0).sum()),
        (np.maximum(X, 0).transpose(2, 0, 1), (X > 0).sum()),
        (np.maximum(X, 0).astype(np.float16), (X > 0).sum()),
        (np.minimum(X, 0).astype(np.float64), (X < 0).sum()),
        (np.zeros((2, 3), np.float32), 0),
        (np.zeros((2, 0), np.float32), 0),
    ],
)
@pytest.mark.parametrize("bins", [Bins(255, 4.0), Bins(255, 0.5), Bins(3, 1.5), Bins(255, 9.0, 2)])
def test_the_counts_are_those_of_the_whole_tensor(tensor, left, bins):
    before = tensor.copy()
    ends = (float(tensor.min()), float(tensor.max())) if tensor.size else (np.inf, -np.inf)
    kept = without_zeros(tensor, ends)
    assert kept.values.size == left
    counts, zeros = count_with_zeros(kept, bins)
    expected = count(tensor, bins)
    assert counts.tolist() == expected.counts.tolist()
    assert zeros == expected.zeros
    assert tensor.tobytes() == before.tobytes()
