"""AdaRound: round the weights of each layer so that its outputs on some data keep their values.

:mod:`klquant.backends.rounding` chooses the integers. Here are the inputs of the layers, taken from the float model.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx

from ...batches import progress_bar
from ...rounding import MAX_INPUTS, Array, portions, round_adaptively
from ..execution import Feed, open_onnxruntime, with_outputs
from ..model.graph import Graph, read_graph, to_array
from ..model.operators import attribute, has_constant_weight
from ..model.preparation import Prepared
from .data import first_samples
from .patches import Rows, as_rows, from_rows, sample_inputs

MOST_VALUES = 2**26  # of the inputs of layers that are held for one batch
MOST_SAMPLES = 64  # of a batch
FEWEST = 15  # levels


def adapt_rounding(
    prepared: Prepared, quantized: onnx.ModelProto, layers: Iterable[str], feeds: Sequence[Feed]
) -> dict[tuple[str, int], Array]:
    """Return weights that lie on the levels of the quantized model, as :func:`with_parameters` takes them.

    Parameters
    ----------
    prepared : Prepared
        The float model.
    quantized : onnx.ModelProto
        The model with Q/DQ, which has the scales.
    layers : iterable of str
        Names of nodes with quantized weights. ConvTranspose, weights of MatMul with more than two dimensions, weights
        with several readers, layers with more than `MAX_INPUTS` inputs and those with coarse steps are left out.
    feeds : sequence
        Some data.

    Notes
    -----
    Shows a bar on a terminal or in a notebook: the layers are done one after the other.
    """
    scales, graph = _scales(quantized), prepared.graph
    every = [(node, as_rows(graph, node)) for node in _able(graph, set(layers) & scales.keys())]
    rows = {
        node.name: one for node, one in every if one.values.shape[-1] <= MAX_INPUTS and _fine(one, scales[node.name])
    }
    found: dict[tuple[str, int], Array] = {}
    with progress_bar("rounding weights", rows) as advance:
        for name, products, samples in _all_products(prepared, rows, feeds):
            steps = np.broadcast_to(scales[name].reshape(-1, 1), (rows[name].outputs, 1)).astype(np.float64)
            found[name, 1] = from_rows(rows[name], _rounded(rows[name], steps, products, samples))
            advance()
    return found


def _rounded(rows: Rows, steps: Array, products: Array, samples: int) -> Array:
    groups = zip(rows.values, np.split(steps, len(rows.values)), products, strict=True)
    return np.stack([round_adaptively(values, step, one, samples) * step for values, step, one in groups])


def _fine(rows: Rows, scale: Array) -> bool:
    """Return whether no channel has steps that are coarse for its bias: rounding would change its range."""
    largest = np.abs(rows.values).max(axis=2).reshape(-1)
    return bool(((largest == 0) | (largest >= FEWEST * scale.reshape(-1))).all())


def _able(graph: Graph, layers: set[str]) -> Iterator[onnx.NodeProto]:
    for node in (node for node in graph.nodes if node.name in layers and has_constant_weight(graph, node)):
        matrix = len(graph.initializers[node.input[1]].dims) == 2 and not attribute(node, "transA", 0)
        shared = len(graph.consumers[node.input[1]]) > 1
        if not shared and (node.op_type == "Conv" or (node.op_type in ("Gemm", "MatMul") and matrix)):
            yield node


def _scales(quantized: onnx.ModelProto) -> dict[str, Array]:
    """Return the scales of the weight of each layer, by name of the node."""
    graph = read_graph(quantized)
    sources = {node.name: graph.producers.get(node.input[1]) for node in graph.nodes if len(node.input) > 1}
    return {
        name: to_array(graph.initializers[source.input[1]])
        for name, source in sources.items()
        if source is not None and source.op_type == "DequantizeLinear" and source.input[0] in graph.initializers
    }


def _all_products(
    prepared: Prepared, rows: Mapping[str, Rows], feeds: Sequence[Feed]
) -> Iterator[tuple[str, Array, int]]:
    """Yield the sum of x x^T over inputs of each layer, and how many; as many layers at once as memory allows."""
    nodes = {node.name: node for node in prepared.graph.nodes}
    for some in portions({name: len(one.values) * one.values.shape[-1] ** 2 for name, one in rows.items()}):
        inputs = dict.fromkeys(nodes[name].input[0] for name in some)
        computed = [name for name in inputs if name not in prepared.graph.inputs]
        counts = dict.fromkeys(some, 0)
        sums = {name: np.zeros((len(rows[name].values), *[rows[name].values.shape[-1]] * 2)) for name in some}
        with open_onnxruntime(with_outputs(prepared.model, computed), optimized=True) as session:
            one = first_samples(prepared, feeds[:1], 1)[0]
            few = _number_of_samples(session(computed, one) if computed else one)
            for feed in first_samples(prepared, feeds, few):
                found = {**feed, **(session(computed, feed) if computed else {})}
                for name in some:
                    x = sample_inputs(nodes[name], rows[name], found[nodes[name].input[0]], len(feeds))
                    sums[name] += np.matmul(x.transpose(0, 2, 1), x)
                    counts[name] += x.shape[1]
        for name in some:
            yield name, sums.pop(name), counts[name]


def _number_of_samples(found: Mapping[str, Array]) -> int:
    """Return how many samples of a batch to run, from the inputs of layers for one of them."""
    size = sum(array.size for array in found.values())
    return int(np.clip(MOST_VALUES // max(size, 1), 1, MOST_SAMPLES))
