"""A function and its quantized form side by side."""

import jax
import numpy as np
import pytest

from klquant.backends.jax import compare, quantize, tune
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


def test_random_keys_are_parameters_inputs_and_results(tmp_path):
    def noisy(params, x, key):
        noise = jax.random.normal(key, x.shape) + jax.random.normal(params["key"], x.shape)
        return {"scores": (x + noise / 100) @ params["w"], "next": jax.random.split(key, 1)}

    params, batches = {**PARAMS, "key": jax.random.key(0)}, [(X, jax.random.key(k)) for k in (1, 2)]
    int8 = quantize(noisy, params, batches, resume=tmp_path / "progress.npz")
    found = compare(noisy, int8, params, batches)
    assert found.float_bytes == 16 * 4 * 4 + 8
    assert [one.name for one in found.outputs] == ["['scores']"]
    other = [(x, jax.random.key(9)) for x, _ in batches]
    files = {"resume": tmp_path / "trials.json", "target": "20dB"}
    assert tune(noisy, params, batches, **files).trace.reached
    with pytest.raises(InvalidInputError, match="must come from a tuning of this model, data"):
        tune(noisy, params, other, **files)
