"""``auto`` on functions: what it returns is what its parts return, measured on data that was held back."""

import jax
import numpy as np
import pytest

from klquant.backends.jax import auto, compare, requantize
from klquant.errors import InvalidInputError

RNG = np.random.default_rng(0)
PARAMS = {"w": RNG.standard_normal((16, 4)).astype(np.float32)}
BATCHES = list(RNG.standard_normal((8, 32, 16)).astype(np.float32) ** 2)


def network(params, x):
    return jax.nn.softplus(x @ params["w"])


@pytest.fixture(scope="module")
def found():
    return auto(network, PARAMS, BATCHES, target="35dB", num_bins=1001)


def test_every_way_is_tried_once_and_the_best_is_returned(found):
    names = [one.what for one in found.attempts]
    assert names[:5] == ["entropy", "max", "percentile", "mse", "auto"]
    assert names[5].endswith(" + zero_points")
    assert names[6].endswith("correct_bias")
    assert found.best.recipe.steps[:1] == ("zero_points",)  # all values are positive
    assert found.best.sqnr_db == max(one.sqnr_db for one in found.attempts[:6]) or found.best is found.attempts[6]
    assert found.quantized.ranges.keys() == {"w"}
    assert found.calibration is found.quantized.calibration
    assert (found.data.calibrated, found.data.measured, found.data.held_out) == (6, 64, True)
    assert found.left_out == ()


def test_its_numbers_are_those_of_compare(found):
    again = compare(network, found.quantized, PARAMS, [BATCHES[3], BATCHES[7]])
    assert found.best.sqnr_db == pytest.approx(again.sqnr_db, abs=1e-6)
    assert found.best.num_bytes == again.int8_bytes
    assert found.float_bytes == again.float_bytes
    assert found.best.int8_share == 1
    assert found.best.ms > 0
    first = requantize(network, PARAMS, BATCHES[0], found.calibration, criterion="max")
    other = compare(network, first, PARAMS, [BATCHES[3], BATCHES[7]])
    assert found.attempts[1].sqnr_db == pytest.approx(other.sqnr_db, abs=1e-6)


def test_the_verdict(found):
    assert found.reached
    assert found.verdict.startswith(f"Accurate enough: with {found.best.what}, top-1 agreement is ")
    assert "on 64 samples that calibration has not seen (target 35dB)" in found.verdict
    assert len(found.rows()) == 8
    assert "labels" in found.advice


def test_time_is_limited_and_data_are_checked():
    short = auto(network, PARAMS, BATCHES[:2], max_seconds=1e-9, metric=lambda a, b: 0.5)
    assert len(short.attempts) == 1
    assert short.left_out[0] == "max"
    assert (short.measure, short.reached, short.data.held_out) == ("metric", False, False)
    with pytest.raises(InvalidInputError, match="iterated twice"):
        auto(network, PARAMS, iter(BATCHES))
    with pytest.raises(InvalidInputError, match="`max_seconds` must be positive"):
        auto(network, PARAMS, BATCHES, max_seconds=0)
