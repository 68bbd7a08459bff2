"""Fingerprints of the layers of a model, by which a calibration recognizes the model."""

import hashlib

import onnx

from ...calibration import Fingerprint
from .graph import FLOATS, Graph, node_key, to_array


def fingerprint(graph: Graph) -> dict[str, Fingerprint]:
    """Return the fingerprint of every node with weights, by the name of its first output."""
    weights = {name: tensor for name, tensor in graph.initializers.items() if tensor.data_type in FLOATS}
    found = {}
    for node in graph.nodes:
        own = [weights[name] for name in node.input if name in weights]
        if own:
            shapes = ", ".join(f"{tuple(t.dims)} {onnx.TensorProto.DataType.Name(t.data_type).lower()}" for t in own)
            digest = hashlib.sha256()
            for tensor in own:
                digest.update(to_array(tensor).tobytes())
            found[node_key(node)] = Fingerprint(f"{node.op_type}({shapes})", digest.hexdigest())
    return found
