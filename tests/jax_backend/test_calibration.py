"""Calibration of JAX functions: the statistics are those of NumPy, whatever the batches, passes and interruptions."""

import warnings

import jax
import numpy as np
import pytest

import klquant
from klquant.backends.jax import Calibration, calibrate
from klquant.errors import CalibrationWarning, InvalidInputError, ModelError
from support.jax_networks import loops, loops_params, random_batches

BATCHES = [np.round(x * 64) / 64 for x in random_batches(40, 40, 7)]  # so that sums are exact, in any order
WEIGHT = np.round(np.random.default_rng(0).standard_normal((16, 12)) * 64) / 64
PARAMS = {"a": WEIGHT.astype(np.float32), "b": np.ones((12, 3), np.float32)}
OPTIONS = {"num_bins": 1001}
pytestmark = pytest.mark.filterwarnings("ignore:layer `[^`]*`. (T =|expected SQNR):klquant.errors.CalibrationWarning")


def network(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


@pytest.fixture(scope="module")
def found():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        return calibrate(network, PARAMS, BATCHES, **OPTIONS)


def assert_same(a, b):
    assert a.amax == b.amax
    for name in a.histograms:
        np.testing.assert_array_equal(a.histograms[name].hist, b.histograms[name].hist)
    assert repr(a.thresholds) == repr(b.thresholds)  # NaN included
    assert (a.zeros, a.ranges, a.beyond) == (b.zeros, b.ranges, b.beyond)


def test_histograms_are_those_of_the_activations(found):
    data = np.concatenate(BATCHES)
    inner = np.concatenate([np.asarray(jax.jit(lambda x: jax.nn.relu(x @ PARAMS["a"]))(x)) for x in BATCHES])
    for name, values in {"a": data, "b": inner}.items():
        expected = klquant.histogram(values, num_bins=1001, amax=found.amax[name])
        np.testing.assert_array_equal(found.histograms[name].hist, expected.hist)
        np.testing.assert_array_equal(found.histograms[name].edges, expected.edges)
        assert found.amax[name] == np.abs(values).max()
        assert found.ranges[name] == (values.min(), values.max())
        assert found.zeros[name] == (values == 0).sum()
    assert (found.num_batches, found.calls) == (3, {"a": 1, "b": 1})
    np.testing.assert_allclose(found.weight_scales["a"], np.abs(PARAMS["a"]).max(axis=0) / 127, rtol=1e-6)


def test_the_split_into_batches_does_not_matter(found):
    data = np.concatenate(BATCHES)
    assert_same(calibrate(network, PARAMS, [data[:20], data[20:]], **OPTIONS), found._replace(num_batches=2))


def test_one_pass_takes_a_stream():
    streamed = calibrate(network, PARAMS, iter(BATCHES), passes=1, **OPTIONS)
    again = calibrate(network, PARAMS, BATCHES[::-1], passes=1, **OPTIONS)
    assert_same(streamed, again)
    for name, histogram in streamed.histograms.items():
        assert histogram.hist.sum() == sum(x.shape[0] for x in BATCHES) * PARAMS[name].shape[0]
        assert abs(histogram.edges[-1] - streamed.amax[name]) < 3 * histogram.edges[-1] / 1001


def test_one_pass_equals_numpy_over_the_same_bins():
    """The ranges grow from batch to batch, so batches are counted over different levels."""
    growing = [x * 4**k for k, x in enumerate(random_batches(30, 30, 30))]
    found = calibrate(network, PARAMS, growing, passes=1, **OPTIONS)
    histogram = found.histograms["a"]
    expected = klquant.histogram(np.concatenate(growing), num_bins=len(histogram.hist), amax=histogram.edges[-1])
    np.testing.assert_array_equal(histogram.hist, expected.hist)


def test_resuming_gives_the_same(found, tmp_path):
    class Interrupted:
        def __init__(self, limit):
            self.limit = limit

        def __iter__(self):
            for number, batch in enumerate(BATCHES):
                if number >= self.limit:
                    raise OSError("no more")
                yield batch

    options = {**OPTIONS, "resume": tmp_path / "progress.npz", "checkpoint_seconds": 0}
    with pytest.raises(OSError, match="no more"):
        calibrate(network, PARAMS, Interrupted(2), **options)
    assert_same(calibrate(network, PARAMS, BATCHES, **options), found)
    with pytest.raises(InvalidInputError, match="checkpoint of this model"):
        calibrate(network, {**PARAMS, "b": PARAMS["b"] * 2}, BATCHES, **options)


def test_a_site_in_loops_has_the_statistics_of_all_iterations():
    params, x = loops_params(), BATCHES[0]
    calibration = calibrate(loops, params, [x], num_bins=1001)
    state, seen = np.maximum(x @ params["first"], 0), []
    for weight in params["blocks"]:
        seen.append(state)
        state = np.tanh(state @ weight)
    assert calibration.calls == {"first": 1, "encoder/block": 4, "last": 3, "dot_general.lhs": 1, "dot_general.rhs": 1}
    assert calibration.skipped == {"never": "it was never called"}
    assert calibration.amax["encoder/block"] == pytest.approx(np.abs(seen).max(), rel=1e-5)
    assert calibration.histograms["encoder/block"].hist.sum() == np.size(seen)
    assert calibration.ranges["encoder/block"] == pytest.approx((np.min(seen), np.max(seen)), rel=1e-5)
    assert len(calibration.weight_scales["encoder/block"]) == 4 * 16


@pytest.mark.parametrize("loop", ["scan", "fori"])
def test_loops_over_layers_of_different_size_are_warned_of(loop):
    def function(params, x):
        if loop == "scan":
            return jax.lax.scan(lambda x, w: (jax.numpy.tanh(x @ w), None), x, params)[0]
        return jax.lax.fori_loop(0, 3, lambda k, x: jax.numpy.tanh(x @ params[k]), x)

    weights = np.random.default_rng(0).standard_normal((3, 16, 16)).astype(np.float32)
    calibrate(function, weights, BATCHES, **OPTIONS)
    weights *= np.array([0.001, 1, 30], np.float32)[:, None, None]
    with pytest.warns(CalibrationWarning, match="its range differs by a factor of .* between the iterations of a loop"):
        calibrate(function, weights, BATCHES, **OPTIONS)


def test_a_calibration_is_saved_and_searched_again(found, tmp_path):
    found.save(tmp_path / "calib.npz")
    loaded = Calibration.load(tmp_path / "calib.npz")
    assert_same(loaded, found)
    assert loaded.model == found.model
    assert loaded.search_thresholds(criterion="max")["a"].threshold == pytest.approx(found.amax["a"])


def test_settings_choose_layers(found):
    chosen = calibrate(network, PARAMS, BATCHES, exclude="b", overrides={"a": {"threshold": 2.0}}, **OPTIONS)
    assert chosen.thresholds["a"].threshold == 2.0
    assert chosen.skipped == {"b": "excluded by the settings"}
    with pytest.raises(InvalidInputError, match="pattern `c` matches none of 2 layers"):
        calibrate(network, PARAMS, BATCHES, exclude="c")
    with pytest.raises(InvalidInputError, match="2 are excluded"):
        calibrate(network, PARAMS, BATCHES, exclude="*")
    with pytest.raises(InvalidInputError, match="`observe` has no meaning"):
        calibrate(network, PARAMS, BATCHES, observe="outputs")


def test_auto_takes_the_criterion_with_the_least_error_of_the_product():
    rng = np.random.default_rng(5)
    x = rng.standard_normal((256, 16)).astype(np.float32)
    x[0, 0] = 60.0  # matters much to its product, as its weight is large
    heavy = {**PARAMS, "a": PARAMS["a"] * np.where(np.arange(16) == 0, 100, 0.1)[:, None].astype(np.float32)}
    light = {**PARAMS, "a": PARAMS["a"] * np.where(np.arange(16) == 0, 0.001, 1)[:, None].astype(np.float32)}
    chosen = [calibrate(network, params, [x], criterion="auto", **OPTIONS).thresholds["a"] for params in (heavy, light)]
    assert chosen[0].threshold > 50
    assert chosen[1].threshold < 30


def test_batches_may_be_one_array():
    params, batches = {"w": np.eye(4, dtype=np.float32)}, np.random.default_rng(0).normal(size=(3, 8, 4)).astype("f4")
    options = {"criterion": "auto", "num_bins": 255, "progress": False}
    one, several = (calibrate(lambda p, x: x @ p["w"], params, data, **options) for data in (batches, [*batches]))
    assert_same(one, several)


def test_errors_name_layer_and_batch():
    bad = [BATCHES[0], np.full((2, 16), np.nan, np.float32)]
    with pytest.raises(InvalidInputError, match=r"layer `a`, batch 1: activations must be finite, got nan"):
        calibrate(network, PARAMS, bad)
    with pytest.raises(ModelError, match=r"batch 1: the function failed, with TypeError: dot_general"):
        calibrate(network, PARAMS, [BATCHES[0], np.ones((2, 15), np.float32)])
    with pytest.raises(ModelError, match="cannot be traced, with KeyError: 'b'"):
        calibrate(network, {"a": PARAMS["a"]}, BATCHES)
    with pytest.raises(InvalidInputError, match="at least one calibration batch"):
        calibrate(network, PARAMS, [])
    with pytest.raises(InvalidInputError, match="one-shot"):
        calibrate(network, PARAMS, iter(BATCHES))
    with pytest.raises(InvalidInputError, match="with matrix products or convolutions, got none"):
        calibrate(lambda params, x: x + 1, PARAMS, BATCHES)
    with pytest.raises(InvalidInputError, match="got none: `b` is left out, as `ragged_dot_general` is not computed"):
        calibrate(lambda params, x: jax.lax.ragged_dot(x, params["b"], np.int32([40])), {"b": WEIGHT[None]}, BATCHES)
    with pytest.raises(InvalidInputError, match="`f` must be a function"):
        calibrate("f", PARAMS, BATCHES)


def test_other_data_in_the_second_pass_are_noticed():
    class Changing:
        scale = 0.5

        def __iter__(self):
            self.scale *= 2
            return iter([x * np.float32(self.scale) for x in BATCHES])

    with pytest.raises(InvalidInputError, match=r"layer `a`, batch 0: expected the data of pass 1"):
        calibrate(network, PARAMS, Changing())


def test_outliers_are_resolved():
    [x] = random_batches(1000)
    x[3, 4] = 1e6
    with pytest.warns(CalibrationWarning, match="1 of its values are outliers beyond"):
        found = calibrate(network, PARAMS, [x], include="a", num_bins=1001)
    assert found.beyond == {"a": 1}
    assert found.histograms["a"].edges[-1] < 1e4
    assert found.amax["a"] == 1e6
