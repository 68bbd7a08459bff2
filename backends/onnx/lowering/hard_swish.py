"""Where HardSwish cuts its input: x clip(x + c, 0, d) is 0 for all x below -c, so no integers are needed for them."""

from collections.abc import Iterator, Mapping

import numpy as np
import onnx

import klquant

from ...ranges import Candidate, Range
from ..model.graph import Graph, to_array
from ..model.operators import is_rectifier, sole_consumer


def cut_ranges(graph: Graph, ranges: Mapping[str, Candidate]) -> dict[str, Candidate]:
    """Return the ranges, those of inputs of HardSwish without the values that it makes 0."""
    lowest = dict(_lowest(graph))
    return {name: _cut(one, lowest[name]) if name in lowest else one for name, one in ranges.items()}


def _lowest(graph: Graph) -> Iterator[tuple[str, float]]:
    """Yield each tensor that only HardSwish reads, and -c."""
    for node in graph.nodes:
        clip = sole_consumer(graph, node.output[0]) if node.op_type == "Add" else None
        value = _constant(graph, node) if clip is not None and clip.op_type == "Clip" else 0.0
        if clip is not None and value > 0 and is_rectifier(graph, clip):
            name = next(one for one in node.input if one not in graph.initializers)
            others = [reader for reader in graph.consumers[name] if reader.name != node.name]
            if others and name not in graph.outputs and all(_is_product(one, clip.output[0]) for one in others):
                yield name, -value


def _constant(graph: Graph, node: onnx.NodeProto) -> float:
    """Return the scalar that a sum adds to an activation; 0 if it adds none."""
    values = [to_array(graph.initializers[name]) for name in node.input if name in graph.initializers]
    return float(values[0].item()) if len(values) == 1 and values[0].size == 1 else 0.0


def _is_product(node: onnx.NodeProto, factor: str) -> bool:
    return node.op_type == "Mul" and factor in node.input


def _cut(one: Candidate, lowest: float) -> Candidate:
    hist = np.array(one.histogram.hist)
    hist[one.histogram.edges[1:] < lowest] = 0
    low, high = one.range
    return Candidate(Range(max(low, lowest), high), klquant.Histogram(hist, one.histogram.edges))
