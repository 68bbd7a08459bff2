"""The judge of corrections, on a detector whose one output joins boxes in pixels and scores."""

import numpy as np
import pytest

from klquant.backends.onnx import prepare
from klquant.backends.onnx.accuracy.output_noise import OutputNoise, output_parts, smooth_outputs
from klquant.backends.onnx.correction.data import spread
from klquant.backends.onnx.correction.output_error import as_one_number, output_errors
from support.onnx_models import build

X = np.where(np.arange(200)[:, None] % 20 == 0, [[-10.0, 0.0]], [[-10.0, -10.0]]).astype(np.float32)


def detector(error):
    """Return boxes up to 3000 and the scores of two classes, with an error of the logits of each class."""
    body = "a = Mul(x, pixels) l = Add(x, e) s = Sigmoid(l) y = Concat<axis=1>(a, s)"
    return build("float[n, 2] x", "float y", body, pixels=np.float32([300]), e=np.float32(error))


def test_joined_outputs_are_judged_in_their_parts():
    graph = prepare(detector([0, 0])).graph
    assert (output_parts(graph), smooth_outputs(graph)) == (["a", "s"], ["a", "l"])


def test_fewer_errors_of_the_background_do_not_pay_for_those_of_scores():
    exact, background, scores = (prepare(detector(error)) for error in ([0, 0], [0.5, 0], [0, 0.3]))
    first, found = output_errors(exact, [background.model, scores.model], [{"x": X}], optimized=False)
    assert first == 1
    assert found > 100
    _, back = output_errors(exact, [scores.model, background.model], [{"x": X}], optimized=False)
    assert back > 1


def test_a_batch_counts_by_its_signal():
    rng = np.random.default_rng(0)
    loud, quiet = (size * rng.normal(size=(2, 50)) for size in (1.0, 1e-4))
    floats, found = ([{"y": loud}, {"y": quiet}], [{"y": 0.9 * loud}, {"y": 0 * quiet}])
    both = [OutputNoise.of(*pair, ["y"]) for pair in zip(floats, found, strict=True)]
    assert [one.share() for one in both] == pytest.approx([0.01, 1])
    assert both[0].plus(both[1]).share() == pytest.approx(0.01, rel=1e-3)
    assert OutputNoise().plus(both[1]).share() == pytest.approx(1)
    assert OutputNoise.of({"y": loud}, {"y": np.full_like(loud, np.nan)}, ["y"]).share() == pytest.approx(1e3)


def test_what_suits_loud_batches_alone_is_no_gain():
    exact, share, constant = (
        prepare(build("float[n, 2] x", "float y", body, c=np.float32([c])))
        for body, c in (("y = Mul(x, c)", 1.0), ("y = Mul(x, c)", 1.05), ("y = Add(x, c)", 0.1))
    )
    feeds = [{"x": size * np.ones((4, 2), np.float32)} for size in (10, 0.1, 0.1, 0.1)]
    models = [share.model, constant.model]
    assert output_errors(exact, models, feeds[:1], optimized=False)[1] == pytest.approx(0.04, rel=0.01)
    assert output_errors(exact, models, feeds, optimized=False)[1] > 1


@pytest.mark.parametrize("rows", [[0, 6], [-1, 3]])
def test_one_sample_does_not_hide_all_others(rows):
    """Seven samples of eight lose half their noise; nearly all noise is in the eighth. Outputs may be flattened."""
    x = np.random.default_rng(0).normal(size=(8, 2, 3)).astype(np.float32)
    noise = np.full_like(x, 0.1)
    noise[0] = 10
    fewer = noise * np.where(noise > 1, 1, 0.5)
    body = "a = Add(x, e) y = Reshape(a, rows)"
    exact, first, second = (
        prepare(build("float[8, 2, 3] x", "float y", body, e=np.float32(e), rows=np.array(rows)))
        for e in (0 * noise, noise, fewer)
    )
    assert output_errors(exact, [first.model, second.model], [{"x": x}], optimized=False)[1] < 0.6


@pytest.mark.parametrize(
    ("inputs", "outputs", "body"),
    [
        ("float[n, 2] x, float k", "float y", "a = Mul(x, c) y = Add(a, k)"),
        ("float[n, 2] x", "float y, float s", "y = Mul(x, c) s = ReduceSum<keepdims=0>(x)"),
    ],
)
def test_scalars_are_no_samples(inputs, outputs, body):
    exact, worse = (prepare(build(inputs, outputs, body, c=np.float32(c))) for c in (1, 2))
    feed = {"x": np.ones((4, 2), np.float32)} | ({"k": np.zeros((), np.float32)} if "k" in inputs else {})
    assert output_errors(exact, [worse.model, exact.model], [feed], optimized=False)[1] < 1e-3


def test_batches_from_the_first_to_the_last_are_taken():
    feeds = [{"x": np.array(k)} for k in range(16)]
    assert [int(feed["x"]) for feed in spread(feeds, 4)] == [0, 4, 8, 12]
    assert spread(feeds, 20) == feeds


def test_gains_are_weighed_and_harm_counts_alone():
    """Chance behind a softmax (1.006) does not hide a gain before it; background does not outweigh lost detections."""
    errors = np.array([[1, 1, 1, 1], [0.17, 1.006, 0.17, 0.8], [0.5, 2, 0.5, 1.5], [0.9, 0.9, 0.9, 0.9]])
    found = as_one_number(errors)
    assert found[[0, 2, 3]].tolist() == pytest.approx([1, 2, 0.9])
    assert 0.3 < found[1] < 0.5
