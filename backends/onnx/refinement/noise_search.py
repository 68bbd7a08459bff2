"""Find the quantizers that cost a model's outputs most, in fewer runs than there are quantizers.

Groups of neighbours round together. The group with the most noise is split in halves until the runs are used up, so
only where noise is concentrated each quantizer gets a run of its own.
"""

import heapq
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import onnx

from ...accuracy.outputs import Outputs
from ...accuracy.padding import unpadded
from ..accuracy.output_noise import OutputNoise, output_parts, smooth_outputs
from ..accuracy.switches import SwitchedModel, switched
from ..execution import Feed, Session, open_onnxruntime, with_outputs
from ..model.graph import Graph

GROUPS = 16  # to begin with
MAX_RUNS = 48
NEGLIGIBLE = 0.01  # part of the noise, below which a group is not split


class NoiseMeter:
    """A quantized model in which any of its quantizers can round, and the noise that they cause in its outputs."""

    def __init__(
        self,
        model: SwitchedModel,
        session: Session,
        feeds: Sequence[Feed],
        places: list[list[str]],
        unit: list[float] | None,
    ) -> None:
        self.quantizers = model.quantizers
        self._model, self._session, self._feeds, self._places = model, session, feeds, places
        self._names = list(dict.fromkeys(name for place in places for name in place))
        self._floats = [self._outputs(feed, ()) for feed in feeds]
        self.unit = unit or [1.0] * len(places)
        self.unit = unit or self._noises(range(len(self.quantizers)))

    def noise(self, numbers: Sequence[int]) -> float:
        """Return the noise if these quantizers round, as a part of that of all together.

        It is the mean of two parts: behind a final softmax or sigmoid, and before it.
        """
        return sum(self._noises(numbers)) / len(self._places)

    def costs(self, max_runs: int = MAX_RUNS) -> dict[str, float]:
        """Return the noise that each quantizer causes; in a group that was not split, all the same."""
        size = max(1, -(-len(self.quantizers) // GROUPS))
        groups = [range(k, min(k + size, len(self.quantizers))) for k in range(0, len(self.quantizers), size)]
        heap = [(-self.noise(group), group.start, group) for group in groups]
        runs, done = len(heap), list[tuple[float, range]]()
        heapq.heapify(heap)
        while heap:
            noise, _, group = heapq.heappop(heap)
            if len(group) == 1 or -noise < NEGLIGIBLE or runs >= max_runs:
                done.append((-noise, group))
                continue
            for half in (group[: len(group) // 2], group[len(group) // 2 :]):
                heapq.heappush(heap, (-self.noise(half), half.start, half))
            runs += 2
        return {self.quantizers[k]: noise / len(group) for noise, group in done for k in group}

    def _noises(self, numbers: Sequence[int]) -> list[float]:
        sums = [OutputNoise() for _ in self._places]
        for feed, floats in zip(self._feeds, self._floats, strict=True):
            found = self._outputs(feed, numbers)
            sums = [
                one.plus(OutputNoise.of(floats, found, place)) for one, place in zip(sums, self._places, strict=True)
            ]
        return [one.share() / unit if unit else 0.0 for one, unit in zip(sums, self.unit, strict=True)]

    def _outputs(self, feed: Feed, numbers: Sequence[int]) -> Outputs:
        return unpadded(feed, self._session(self._names, {**feed, **self._model.rounding(numbers)}))


@contextmanager
def open_meter(
    graph: Graph, quantized: onnx.ModelProto, feeds: Sequence[Feed], unit: list[float] | None = None
) -> Iterator[NoiseMeter]:
    """Yield a meter of what :func:`quantize` made of the model with this graph; `unit` is that of another meter."""
    model = switched(graph, quantized)
    places = [smooth_outputs(graph), output_parts(graph)]
    names = list(dict.fromkeys(name for place in places for name in place))
    with open_onnxruntime(with_outputs(model.model, names), optimized=True) as session:
        yield NoiseMeter(model, session, feeds, places, unit)
