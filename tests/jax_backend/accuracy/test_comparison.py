"""A function and its quantized form side by side."""

import numpy as np
import pytest

from klquant.backends.jax import compare, quantize
from klquant.errors import InvalidInputError

RNG = np.random.default_rng(0)
PARAMS = {"w": RNG.standard_normal((16, 4)).astype(np.float32), "name": "network"}
X = RNG.standard_normal((64, 16)).astype(np.float32)


def network(params, x):
    assert params["name"] == "network"
    return {"scores": x @ params["w"], "sum": x.sum()}


def test_outputs_time_and_size():
    int8 = quantize(network, PARAMS, [X], criterion="max")
    labels = (X @ PARAMS["w"]).argmax(axis=1)
    found = compare(network, int8, PARAMS, [X[:40], X[40:]], labels=labels)
    scores, total = found.outputs
    assert (scores.name, total.name) == ("['scores']", "['sum']")
    assert 30 < scores.sqnr_db < 60
    assert scores.float_accuracy == 1
    assert total.sqnr_db > 100
    assert (found.float_bytes, found.int8_bytes, found.num_batches) == (16 * 4 * 4, 16 * 4 + 4 * 4, 2)
    assert found.time_ratio > 0
    with pytest.raises(InvalidInputError, match="expected the result of quantize, got function"):
        compare(network, network, PARAMS, [X])
