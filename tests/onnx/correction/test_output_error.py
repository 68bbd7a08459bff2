"""The judge of corrections, on a detector whose one output joins boxes in pixels and scores."""

import numpy as np

from klquant.backends.onnx import prepare
from klquant.backends.onnx.accuracy.output_noise import output_parts, smooth_outputs
from klquant.backends.onnx.correction.output_error import output_errors
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
