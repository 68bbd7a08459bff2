"""How far quantized models are from a float model, at their outputs."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import numpy as np
import onnx

from ..execution import Feed, open_onnxruntime
from ..feeds import Array


def output_errors(
    exact: onnx.ModelProto, models: Sequence[onnx.ModelProto], feeds: Iterable[Feed], *, optimized: bool
) -> list[float]:
    """Return sum((y - y_hat)^2) / sum(y^2) of each model, averaged over the outputs; NaN without outputs of floats.

    With `optimized`, onnxruntime runs the models in INT8, else as they are written.
    """
    names = [value.name for value in exact.graph.output]
    signal = np.zeros(len(names))
    noise = np.zeros((len(models), len(names)))
    with ExitStack() as stack:
        reference = stack.enter_context(open_onnxruntime(exact, optimized=True))
        sessions = [stack.enter_context(open_onnxruntime(model, optimized=optimized)) for model in models]
        for feed in feeds:
            expected = reference(names, feed)
            signal += [_energy(expected[name]) for name in names]
            for k, session in enumerate(sessions):
                found = session(names, feed)
                noise[k] += [_energy(_difference(expected[name], found[name])) for name in names]
    used = signal > 0
    with np.errstate(invalid="ignore"):
        return [float((row[used] / signal[used]).mean()) if used.any() else np.nan for row in noise]


def _difference(expected: Array, found: Array) -> Array:
    return found.astype(np.float64) - expected if found.shape == expected.shape else np.full(1, np.inf)


def _energy(values: Array) -> float:
    """Return the sum of squares of floats; 0 for integers."""
    if values.dtype.kind != "f":
        return 0.0
    with np.errstate(over="ignore"):
        return float((values.astype(np.float64) ** 2).sum())
