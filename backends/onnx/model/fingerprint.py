"""From a float model and data to the thresholds of its activations."""

import hashlib

import onnx

from ...calibration import Fingerprint
from .graph import FLOATS, to_array
from .normal_form import first_output


def fingerprint(model: onnx.ModelProto) -> dict[str, Fingerprint]:
    """Return the fingerprint of every node of a prepared model that has weights, by the name of its output."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type in FLOATS}
    found = {}
    for node in model.graph.node:
        own = [weights[name] for name in node.input if name in weights]
        if own:
            shapes = ", ".join(f"{tuple(t.dims)} {onnx.TensorProto.DataType.Name(t.data_type).lower()}" for t in own)
            digest = hashlib.sha256()
            for tensor in own:
                digest.update(to_array(tensor).tobytes())
            found[first_output(node)] = Fingerprint(f"{node.op_type}({shapes})", digest.hexdigest())
    return found
