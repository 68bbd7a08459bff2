"""How far quantized models are from a float model, at their outputs."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack

import numpy as np
import onnx

from ...accuracy.outputs import Outputs, count_samples
from ...accuracy.padding import unpadded
from ..accuracy.output_noise import OutputNoise, output_parts, smooth_outputs
from ..execution import Feed, open_onnxruntime, with_outputs
from ..feeds import Array
from ..model.preparation import Prepared

MOST = 1e6  # times the noise of the first model
HARMFUL = 1.05  # times that noise: above, what grows counts alone


def output_errors(
    exact: Prepared, models: Sequence[onnx.ModelProto], feeds: Iterable[Feed], *, optimized: bool
) -> list[float]:
    """Return the noise in the outputs of each model, relative to that of the first one.

    It is measured behind a final softmax or sigmoid and before it, over all data and as the mean of the decibels of
    each sample. The geometric mean of these four counts. If the noise grows by one of them, the worst counts: a
    detector may gain on the many logits of the background and lose the few scores that matter, and a correction may
    suit loud samples alone. With `optimized`, onnxruntime runs the models in INT8, else as they are written.
    """
    places = [smooth_outputs(exact.graph), output_parts(exact.graph)]
    names = list(dict.fromkeys(name for place in places for name in place))
    sums, single = [[OutputNoise() for _ in places] for _ in models], list[list[list[float]]]()
    with ExitStack() as stack:
        reference = stack.enter_context(open_onnxruntime(with_outputs(exact.model, names), optimized=True))
        open_all = (open_onnxruntime(with_outputs(model, names), optimized=optimized) for model in models)
        sessions = [stack.enter_context(opened) for opened in open_all]
        for feed in feeds:
            outputs = [session(names, feed) for session in (reference, *sessions)]
            for sample, *results in _samples(feed, outputs):
                expected, *found = (unpadded(sample, result) for result in results)
                noises = [[OutputNoise.of(expected, one, place) for place in places] for one in found]
                single.append([[noise.share() for noise in row] for row in noises])
                sums = [[a.plus(b) for a, b in zip(*rows, strict=True)] for rows in zip(sums, noises, strict=True)]
    total = _relative([[noise.share() for noise in row] for row in sums])
    logs = [np.log(np.clip(_relative(shares), 1 / MOST, MOST)) for shares in single]
    four = np.concatenate([np.clip(total, 1 / MOST, MOST), np.exp(np.mean(logs, axis=0))], axis=1)
    return [float(one) for one in as_one_number(four)]


def _samples(feed: Feed, outputs: Sequence[Outputs]) -> Iterator[list[Outputs]]:
    """Yield the inputs and outputs of each sample; those of the batch where their first axes do not tell the samples.

    In one sample of many the maximum behind a softmax may move, which hides what happens in all others. As one of many
    decibels it counts no more than they do.
    """
    every, number = [feed, *outputs], count_samples([feed])
    uneven = any(array.shape[:1] != (number,) for array in feed.values())
    if number < 2 or uneven or any(not array.ndim or len(array) % number for one in outputs for array in one.values()):
        yield every
        return
    parts = [{name: np.split(array, number) for name, array in one.items()} for one in every]
    for k in range(number):
        yield [{name: pieces[k] for name, pieces in one.items()} for one in parts]


def as_one_number(errors: Array) -> Array:
    """Return the geometric mean of each row; its largest number if that shows harm, which may not be outweighed."""
    worst: Array = errors.max(axis=1)
    return np.where(worst > HARMFUL, worst, np.exp(np.log(errors).mean(axis=1)))


def _relative(shares: Sequence[Sequence[float]]) -> Array:
    """Return the noise of each model (axis 0) at each place relative to the first one; 1 if both have none."""
    errors = np.array(shares)
    with np.errstate(invalid="ignore", divide="ignore"):
        relative: Array = np.nan_to_num(errors / errors[0], nan=1.0)
    return relative
