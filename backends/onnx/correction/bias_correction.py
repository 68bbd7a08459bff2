"""Empirical bias correction: quantization shifts the mean of a layer's output, and the bias can compensate for it.

After M. Nagel, M. van Baalen, T. Blankevoort and M. Welling, Data-Free Quantization Through Weight Equalization and
Bias Correction, ICCV 2019, appendix D.

The shift is measured in two ways: against the float model, which takes in what the layers before do to the inputs, or
against the same layer with float weights. The first is better where all values of a channel are alike, the second where
few large values are clipped: their error would move all others. Which is better, and whether either helps, depends on
the network and the data, so it is measured: the shifts come from every other batch, and the rest judges.
"""

import logging
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import numpy as np
import onnx

from klquant.errors import InvalidInputError

from ..execution import Feed, open_onnxruntime
from ..feeds import Array
from ..model.preparation import Prepared
from .biases import Bias, find_bias
from .data import halved, read_feeds
from .output_error import output_errors
from .parameters import with_parameters
from .side_by_side import COUNT, NEW, SUM, join

MAX_BATCHES = 32
"""How many batches are used: more would cost time and change little."""
NOTICEABLE = 0.95
"""The error of the outputs must fall to this part of what it was: less may be chance."""
logger = logging.getLogger("klquant")


class Corrected(NamedTuple):
    """A float model with corrected biases."""

    prepared: Prepared
    """To be quantized as before."""
    corrections: dict[str, float]
    """The largest absolute correction of each layer, in units of its output; empty if correcting does not help."""


def correct_biases(
    prepared: Prepared,
    write: Callable[[Prepared], onnx.ModelProto],
    layers: Collection[str],
    batches: Iterable[Any],
    *,
    always: bool,
    optimized: bool,
) -> Corrected:
    """Add to the bias of each quantized layer what quantization takes from the mean of each output channel.

    Parameters
    ----------
    prepared : Prepared
        The float model.
    write : callable
        Returns the model with Q/DQ.
    layers : collection of str
        Names of the nodes to correct.
    batches : iterable
        Some data. A single batch is halved.
    always : bool
        Correct the biases also if the error of the outputs grows by it, or if one sample is all there is.
    optimized : bool
        Judge by the INT8 kernels of onnxruntime, not by the model as written.

    Raises
    ------
    InvalidInputError
        For no batches or batches that do not fit, NaN or infinity in the output of a layer.
    ModelError
        If onnxruntime cannot run the quantized model.
    """
    found = (find_bias(prepared.graph, node) for node in prepared.graph.nodes if node.name in layers)
    biases = [bias for bias in found if bias is not None]
    feeds = halved(prepared, list(read_feeds(prepared, batches)))
    measuring, judging = feeds[::2], feeds[1::2]
    if not biases or not (judging or always):
        return Corrected(prepared, {})
    quantized = write(prepared)
    sides = [_SideBySide(prepared, quantized, biases, inputs=how) for how in (False, True)]
    for side in sides:
        side.update(measuring)
    relative = [0.0, 0.0]
    if judging:
        models = [quantized, *(write(side.corrected(prepared)) for side in sides)]
        _, *relative = output_errors(prepared, models, judging, optimized=optimized)
        logger.info("corrected biases make the error of the outputs %.3g or %.3g times as large", *relative)
    best = sides[int(np.argmin(relative))]
    if not (always or min(relative) < NOTICEABLE):
        return Corrected(prepared, {})
    best.update(judging)
    largest = {bias.layer: float(np.abs(shift).max()) for bias, shift in best.shifts()}
    return Corrected(best.corrected(prepared), largest)


class _SideBySide:
    """The mean of what quantization takes from each output channel, over the batches so far."""

    def __init__(self, prepared: Prepared, quantized: onnx.ModelProto, biases: list[Bias], *, inputs: bool) -> None:
        self._model, names = join(prepared, quantized, biases, inputs=inputs)
        self._biases = dict(zip(names, biases, strict=True))
        self._state: dict[str, Array] = {name + COUNT: np.zeros((), np.float32) for name in names}
        self._state |= {name + SUM: np.zeros(len(b.values), np.float32) for name, b in self._biases.items()}

    def update(self, feeds: Iterable[Feed]) -> None:
        """Run more batches."""
        with open_onnxruntime(self._model, optimized=False) as session:
            for feed in feeds:
                new = session([name + NEW for name in self._state], {**feed, **self._state})
                self._state = {name: new[name + NEW] for name in self._state}

    def shifts(self) -> list[tuple[Bias, Array]]:
        """Return what to add to each bias."""
        means = [(b, self._state[name + SUM] / self._state[name + COUNT]) for name, b in self._biases.items()]
        for bias, mean in means:
            if not np.isfinite(mean).all():
                raise InvalidInputError(f"the output of layer `{bias.layer}` must be finite, got NaN or infinity")
        return means

    def corrected(self, prepared: Prepared) -> Prepared:
        """Return the float model with corrected biases."""
        return with_parameters(
            prepared, {(b.node, b.position): (b.values + mean).astype(b.values.dtype) for b, mean in self.shifts()}
        )
