"""Embeddings: which tables of constants become integers. Dequantizing what was gathered costs next to nothing."""

import numpy as np
import onnx

from ..model.graph import Graph
from ..model.operators import attribute, is_excluded
from ..model.signs import ONNX

MIN_WIDTH = 16  # of the vectors: narrower tables are coordinates and the like, not embeddings
MIN_SIZE = 2**14  # values: smaller tables gain nothing


def embeddings(graph: Graph, exclude: tuple[str, ...]) -> set[str]:
    """Return the names of the nodes that gather vectors from a table which is large enough."""
    return {
        node.name
        for node in graph.nodes
        if node.op_type == "Gather" and node.domain in ONNX and not attribute(node, "axis", 0)
        if _is_large(graph.initializers.get(node.input[0])) and not is_excluded(graph, node, exclude)
    }


def _is_large(table: onnx.TensorProto | None) -> bool:
    if table is None or table.data_type != onnx.TensorProto.FLOAT or len(table.dims) < 2:
        return False
    return table.dims[-1] >= MIN_WIDTH and int(np.prod(table.dims, dtype=np.float64)) >= MIN_SIZE
