"""How far quantized models are from a float model, at their outputs."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import numpy as np
import onnx

from ...accuracy.padding import unpadded
from ..accuracy.output_noise import output_noise, output_parts, smooth_outputs
from ..execution import Feed, open_onnxruntime, with_outputs
from ..model.preparation import Prepared


def output_errors(
    exact: Prepared, models: Sequence[onnx.ModelProto], feeds: Iterable[Feed], *, optimized: bool
) -> list[float]:
    """Return the noise in the outputs of each model, relative to that of the first one.

    It is measured twice, behind a final softmax or sigmoid and before it, and the worse result counts: a detector may
    gain on the many logits of the background and lose the few scores that matter. With `optimized`, onnxruntime runs
    the models in INT8, else as they are written.
    """
    places = [smooth_outputs(exact.graph), output_parts(exact.graph)]
    names = list(dict.fromkeys(name for place in places for name in place))
    errors = np.zeros((len(models), len(places)))
    with ExitStack() as stack:
        reference = stack.enter_context(open_onnxruntime(with_outputs(exact.model, names), optimized=True))
        open_all = (open_onnxruntime(with_outputs(model, names), optimized=optimized) for model in models)
        sessions = [stack.enter_context(opened) for opened in open_all]
        for feed in feeds:
            expected = unpadded(feed, reference(names, feed))
            for k, session in enumerate(sessions):
                found = unpadded(feed, session(names, feed))
                errors[k] += [output_noise({name: expected[name] for name in place}, found) for place in places]
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = errors / errors[0]
    return [float(worse) for worse in np.nan_to_num(relative, nan=1.0).max(axis=1)]
