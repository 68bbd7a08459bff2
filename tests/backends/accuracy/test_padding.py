"""Positions that only fill up a batch do not count."""

import numpy as np
import pytest

from klquant.backends.accuracy.padding import unpadded
from klquant.backends.onnx import compare
from support.onnx_models import build

MASK = np.array([[1, 1, 0], [1, 0, 0]], np.int64)
HIDDEN = np.arange(24.0, dtype=np.float32).reshape(2, 3, 4)
POOLED = np.ones((2, 4), np.float32)


@pytest.mark.parametrize("name", ["attention_mask", "decoder_attention_mask"])
@pytest.mark.parametrize("dtype", [np.int64, np.int32, bool])
def test_only_positions_that_count_are_left(name, dtype):
    found = unpadded({"ids": MASK, name: MASK.astype(dtype)}, {"hidden": HIDDEN, "pooled": POOLED})
    assert found["pooled"] is POOLED
    np.testing.assert_array_equal(found["hidden"], HIDDEN[[0, 0, 1], [0, 1, 0]][None])


@pytest.mark.parametrize(
    "feed",
    [
        {"ids": MASK},
        {"attention_mask": np.ones_like(MASK)},
        {"attention_mask": np.zeros_like(MASK)},
        {"attention_mask": -1e9 * (1.0 - MASK)},
        {"attention_mask": MASK[:, None, None]},
        {"attention_mask": MASK.tolist()},
        [MASK],
    ],
)
def test_without_a_mask_of_zeros_and_ones_all_positions_count(feed):
    outputs = {"hidden": HIDDEN}
    assert unpadded(feed, outputs) is outputs


@pytest.mark.parametrize("shape", [(2, 3), (3, 2, 4), (2, 4, 3)])
def test_outputs_of_other_shapes_stay(shape):
    other = np.ones(shape, np.float32)
    assert unpadded({"attention_mask": MASK}, {"y": other})["y"] is other


def test_noise_on_filled_up_positions_is_not_compared():
    inputs, body = "float[n, 3, 4] x, int64[n, 3] attention_mask", "y = Mul(x, one)"
    exact = build(inputs, "float y", body, one=np.float32(1))
    other = build(inputs, "float y", "b = Cast<to=9>(attention_mask) c = Unsqueeze(b, axis) t = Mul(x, noisy) "
                  "f = Mul(x, far) y = Where(c, t, f)", noisy=np.float32(1.01), far=np.float32(9),
                  axis=np.array([2]))  # fmt: skip
    batch = {"x": np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32), "attention_mask": MASK}
    found = compare(exact, other, [batch], engine="onnxruntime").outputs[0]
    assert found.sqnr_db == pytest.approx(40, abs=0.01)
    assert found.cosine == pytest.approx(1)
    whole = compare(exact, other, [batch | {"attention_mask": 1 - MASK}], engine="onnxruntime").outputs[0]
    assert whole.sqnr_db == pytest.approx(40, abs=0.01)


def test_a_metric_gets_all_positions():
    model = build("float[n, 3, 4] x, int64[n, 3] attention_mask", "float y", "y = Mul(x, one)", one=np.float32(1))
    sizes = compare(model, model, [{"x": HIDDEN, "attention_mask": MASK}], engine="onnxruntime",
                    metric=lambda a, b: float(a[0]["y"].size)).metric  # fmt: skip
    assert sizes == 24
