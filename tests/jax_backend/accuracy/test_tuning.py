"""Which products cost most, and functions tuned by leaving them out."""

import numpy as np
import pytest

from klquant.backends.jax import calibrate, requantize, sensitivity, tune
from klquant.errors import InvalidInputError
from support.jax_networks import sqnr_db

RNG = np.random.default_rng(0)
X = RNG.standard_normal((128, 16)).astype(np.float32)
X[:, 0] *= 200  # without effect on the results, but it takes the levels of the others
PARAMS = {
    "spread": RNG.standard_normal((16, 16)).astype(np.float32) * np.where(np.arange(16), 1, 1e-4)[:, None],
    "even": RNG.standard_normal((16, 16)).astype(np.float32),
}
BATCHES = [X[k : k + 32] for k in range(0, 128, 32)]
OPTIONS = {"num_bins": 1001, "min_int8": 0.5}


def network(params, x):
    return np.tanh(1) * (x @ params["spread"].astype("float32")) @ params["even"]


@pytest.fixture(scope="module")
def calibration():
    return calibrate(network, PARAMS, BATCHES, criterion="max", num_bins=1001)


def test_sensitivity_finds_the_harmful_product(calibration):
    first, second = sensitivity(network, PARAMS, calibration, BATCHES[:1])
    assert (first.name, second.name) == ("spread", "even")
    assert first.alone_sqnr_db < 15
    assert first.without_sqnr_db > 30
    alone = requantize(network, PARAMS, BATCHES[0], calibration, form="simulate", exclude="even")
    exact, found = network(PARAMS, BATCHES[0]), alone.function(PARAMS, BATCHES[0])
    assert first.alone_sqnr_db == pytest.approx(sqnr_db(exact, found), abs=0.1)
    assert second.without_sqnr_db == pytest.approx(first.alone_sqnr_db, abs=0.1)
    with pytest.raises(InvalidInputError, match="at least one batch"):
        sensitivity(network, PARAMS, calibration, [])
    with pytest.raises(InvalidInputError, match="call search_thresholds"):
        sensitivity(network, PARAMS, calibration._replace(thresholds={}), BATCHES)


def test_tuning_leaves_the_harmful_product_out(tmp_path):
    log = tmp_path / "trials.json"
    found = tune(network, PARAMS, BATCHES, target="30dB", resume=log, **OPTIONS)
    assert found.trace.reached
    assert found.trace.best.recipe.exclude == ("spread",)
    assert found.trace.best.measured.int8_share == 0.5
    assert list(found.quantized.thresholds) == ["even"]
    assert sqnr_db(network(PARAMS, X), found.quantized.function(PARAMS, X)) > 30
    again = tune(network, PARAMS, BATCHES, target="30dB", resume=log, **OPTIONS)
    assert again.trace.trials == found.trace.trials  # taken from the file, times included
