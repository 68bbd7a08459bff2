"""The noise of quantization in the outputs of a model, measured where it adds up."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from ..feeds import Array
from ..model.graph import MAX_CHAIN, Graph
from ..model.operators import MOVING

SQUASHING = ("Softmax", "LogSoftmax", "Sigmoid")
TINY = 1e-30
FLOOR = 1.0  # of the mean energy of an output's channels: in quieter ones the noise counts no more than in that


def smooth_outputs(graph: Graph) -> list[str]:
    """Return the parts of the outputs, or the tensors before a final softmax or sigmoid.

    Behind a softmax noise does not add up: it turns a few values over and leaves the others as they are.
    """
    return list(dict.fromkeys(_before_squashing(graph, part) for part in output_parts(graph)))


def output_parts(graph: Graph) -> list[str]:
    """Return the outputs of a model, or what they are concatenated from.

    Detectors join boxes, in pixels, and scores from 0 to 1: in the whole, the noise of the boxes hides the other.
    """
    return list(dict.fromkeys(part for output in graph.outputs for part in _parts(graph, output, MAX_CHAIN)))


def _parts(graph: Graph, output: str, steps: int) -> list[str]:
    name = output
    for left in range(steps, 0, -1):
        node = graph.producers.get(name)
        if node is not None and node.op_type == "Concat":
            computed = [part for part in node.input if part not in graph.initializers]
            return [part for joined in computed for part in _parts(graph, joined, left - 1)]
        if node is None or node.op_type not in MOVING:
            break
        name = node.input[0]
    return [output]


def _before_squashing(graph: Graph, output: str) -> str:
    name: str = output
    for _ in range(MAX_CHAIN):
        node = graph.producers.get(name)
        if node is None or node.op_type not in (*MOVING, *SQUASHING):
            break
        name = node.input[0]
        if node.op_type in SQUASHING:
            return name
    return output


class OutputNoise(NamedTuple):
    """The noise in the outputs of a model beside the signal, over batches.

    A batch counts by its signal: what is noise beside the outputs of silence, or of an empty picture, may be nothing
    beside those of speech.
    """

    noises: Mapping[str, float] = {}
    """By output: what it is as a share of the signal, times the signal."""
    signals: Mapping[str, float] = {}

    @classmethod
    def of(cls, floats: Mapping[str, Array], found: Mapping[str, Array], names: Iterable[str]) -> "OutputNoise":
        """Compare some outputs of a float model with those that have noise, for one batch."""
        both = {name: _noise(floats[name], found[name]) for name in names}
        return cls({k: share * signal for k, (share, signal) in both.items()}, {k: one for k, (_, one) in both.items()})

    def plus(self, other: "OutputNoise") -> "OutputNoise":
        """Return the sum over the batches of both."""
        return OutputNoise(*(Counter(mine) + Counter(more) for mine, more in zip(self, other, strict=True)))

    def share(self) -> float:
        """Return the noise as a share of the signal, summed over the outputs."""
        return sum(noise / self.signals[name] for name, noise in self.noises.items() if noise)


def _noise(floats: Array, found: Array) -> tuple[float, float]:
    """Return noise / signal of an output, as the mean over its channels (axis 1), and the signal.

    Both are 0 for outputs that are no floats.
    """
    if floats.dtype.kind != "f" or floats.shape != found.shape or not floats.size:
        return 0.0, 0.0
    x, y = floats.astype(np.float64), found.astype(np.float64)
    x, noise = np.where(np.isfinite(x), x, 0), np.where(np.isfinite(x), x - y, 0)
    axes = tuple(k for k in range(x.ndim) if k != 1) if x.ndim > 2 else None
    signals, noises = ((values**2).mean(axis=axes) for values in (x, noise))
    mean = max(float(np.mean(signals)), TINY)
    share = np.mean(noises / np.maximum(signals, FLOOR * mean))
    return float(np.nan_to_num(share, nan=1e3)), mean * x.size
