import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from klquant.backends.onnx import calibrate, quantize
from klquant.backends.onnx.correction.alignment import best_shift
from klquant.backends.onnx.qdq.grids import Grid
from klquant.backends.onnx.refinement import corrected_choice
from klquant.errors import InvalidInputError
from support.onnx_models import build, run

rng = np.random.default_rng(0)
GRID = Grid(12.7, 0.1, 0, onnx.TensorProto.INT8)
IMAGE = "float[n, 3, 8, 8] x"


def rounding_error(values, shift=0.0):
    moved = values + shift
    return np.square(np.rint(moved / GRID.scale) * GRID.scale - moved)


def page(number):
    """Return images of which most is one colour, as paper is."""
    x = np.full((number, 3, 8, 8), 0.8, np.float32)
    x[:, :, 2:4, 2:6] = rng.uniform(0, 1, (number, 3, 2, 4))
    return x


PAGES = [page(8) for _ in range(4)]


FLOATS = ["mul1", "add2", "sigmoid3"]  # the function behind the convolution, whose constants take up a shift


def network():
    body = "t = Conv(x, w, b) m = Mul(t, k) a = Add(m, s) y = Sigmoid(a)"
    return build(IMAGE, "float y", body, w=(16, 3, 1, 1), b=(16,), k=np.float32([0.7]), s=np.float32([0.2]))


def test_the_frequent_value_of_each_channel_comes_to_lie_on_a_level():
    values = np.concatenate([np.repeat([[0.537], [-1.262], [0.3]], 300, 1), rng.uniform(-2, 2, (3, 30))], axis=1)
    shift = best_shift(values, GRID)
    np.testing.assert_allclose(shift, [-0.037, -0.038, 0.0], atol=0.1 / 64)


@given(st.lists(st.floats(-12, 12), min_size=1, max_size=30))
def test_the_error_of_rounding_never_grows_and_the_shift_is_at_most_half_a_step(values):
    channel = np.array([values])
    shift = best_shift(channel, GRID)
    assert np.abs(shift).max() <= GRID.scale / 2
    slack = GRID.scale**2 / 64  # values count as the middle of a 64th of a step
    assert rounding_error(channel, shift[0]).mean() <= rounding_error(channel).mean() + slack


def test_values_of_photos_are_not_shifted_by_chance():
    for positions in (16, 300, 2048):
        assert not best_shift(rng.normal(size=(20, positions)), GRID).any()


def test_pages_have_less_noise_where_a_function_follows_in_floating_point(monkeypatch):
    model = network()
    calibration = calibrate(model, PAGES, criterion="max")
    test = page(16)

    def error():
        options = {"correct_bias": True, "adaround": False, "min_int8": 1}
        found = quantize(model, calibration, engine="onnxruntime", exclude=FLOATS, batches=PAGES, **options)
        return float(np.square(run(model, x=test)["y"] - run(found.model, x=test)["y"]).mean())

    aligned = error()
    monkeypatch.setattr(corrected_choice, "aligned", lambda placement, feeds: placement)
    assert aligned < 0.8 * error()


def test_values_must_be_finite():
    model = network()
    calibration = calibrate(model, PAGES, criterion="max")
    wrong = [PAGES[0], np.where(PAGES[1] > 0.9, np.float32("nan"), PAGES[1])]
    with pytest.raises(InvalidInputError, match="tensor `t` must be finite, got NaN or infinity"):
        quantize(model, calibration, engine="onnxruntime", exclude=FLOATS, batches=wrong)
