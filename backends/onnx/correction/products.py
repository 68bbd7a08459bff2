"""Products of an activation with constant matrices, grouped by the activation, and what is known of its channels."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import onnx

from klquant.errors import InvalidInputError

from ..execution import open_onnxruntime, with_outputs
from ..feeds import Array
from ..model.graph import Graph, to_array
from ..model.operators import attribute, has_constant_weight
from ..model.preparation import Prepared
from .data import read_feeds


class Products(NamedTuple):
    """The layers that multiply one activation, of which they see the last axis as channels."""

    activation: str
    layers: list[onnx.NodeProto]
    weights: list[Array]
    """Of each layer, float64, shape (channels, outputs)."""


class Channels(NamedTuple):
    """What was seen of an activation: its last axis."""

    amax: Array
    """Largest absolute value, shape (channels,)."""
    power: Array
    """Mean square, shape (channels,)."""


def find_products(graph: Graph) -> list[Products]:
    """Return the groups of MatMul and Gemm nodes with a constant matrix, in the order of the graph."""
    found: dict[str, Products] = {}
    for node in graph.nodes:
        if node.op_type in ("MatMul", "Gemm") and has_constant_weight(graph, node) and not attribute(node, "transA", 0):
            weight = to_array(graph.initializers[node.input[1]]).astype(np.float64)
            if weight.ndim == 2:
                group = found.setdefault(node.input[0], Products(node.input[0], [], []))
                group.layers.append(node)
                group.weights.append(weight.T if attribute(node, "transB", 0) else weight)
    return list(found.values())


def read_by_only(graph: Graph, group: Products) -> bool:
    """Return whether nothing else reads the activation of these products, as anything but their first input."""
    name = group.activation
    layers = {node.name for node in group.layers}
    readers = {node.name for node in graph.consumers[name]}
    return readers == layers and name not in graph.outputs and all(list(n.input).count(name) == 1 for n in group.layers)


def observe_channels(prepared: Prepared, groups: Iterable[Products], batches: Iterable[Any]) -> dict[str, Channels]:
    """Run the float model; return what the channels of each activation hold."""
    sizes = {group.activation: len(group.weights[0]) for group in groups}
    amax = {name: np.zeros(size) for name, size in sizes.items()}
    power, count = {name: np.zeros(size) for name, size in sizes.items()}, dict.fromkeys(sizes, 0)
    with open_onnxruntime(with_outputs(prepared.model, sizes), optimized=True) as session:
        for number, feed in enumerate(read_feeds(prepared, batches)):
            found = session([name for name in sizes if name not in feed] or prepared.graph.outputs, feed)
            for name, size in sizes.items():
                rows = (feed | found)[name].reshape(-1, size).astype(np.float64)
                if not np.isfinite(rows).all():
                    raise InvalidInputError(
                        f"tensor `{name}`, batch {number}: expected finite values, got NaN or infinity"
                    )
                amax[name] = np.maximum(amax[name], np.abs(rows).max(0, initial=0.0))
                power[name] += np.square(rows).sum(0)
                count[name] += len(rows)
    return {name: Channels(amax[name], power[name] / max(count[name], 1)) for name in sizes}
