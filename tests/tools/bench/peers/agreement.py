"""The agreement of two calibrations, and of the models made from them, in percent of what both have."""

import numpy as np
from onnx import numpy_helper

RECTIFIERS = ("Relu", "Clip")
CLOSE = 1e-6  # a few roundings of float32


def of_thresholds(found, others):
    """Compare thresholds by tensor."""
    common = found.keys() & others.keys()
    return _percent([abs(found[name] - others[name]) <= CLOSE * others[name] for name in common])


def of_grids(model, other):
    """Compare the quantizers of activations: scale, zero point and type, on either side of a ReLU."""
    found, others = _grids(model, other), _grids(other, model)
    common = found.keys() & others.keys()
    pairs = ((found[name], others[name]) for name in common)
    return _percent([a[1:] == b[1:] and abs(a[0] - b[0]) <= CLOSE * b[0] for a, b in pairs])


def of_weights(model, other):
    """Compare the integers of weights, one by one."""
    found, others = _weights(model), _weights(other)
    assert found.keys() == others.keys()
    return _percent(np.concatenate([(found[name] == others[name]).ravel() for name in found]))


def _percent(equal):
    assert len(equal) > 0
    return 100 * float(np.mean(equal))


def _grids(*models):
    """Return scale, zero point and type of each quantizer of the first model, by tensor, with the ReLUs of both."""
    model = models[0]
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    rectifiers = [node for each in models for node in each.graph.node if node.op_type in RECTIFIERS]
    behind = {node.input[0]: node.output[0] for node in rectifiers}
    found = {}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] not in constants:
            scale, zero_point = (constants[name] for name in node.input[1:3])
            found[behind.get(node.input[0], node.input[0])] = float(scale), int(zero_point), zero_point.dtype
    return found


def _weights(model):
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return {name: array for name, array in tensors.items() if array.dtype == np.int8 and array.ndim > 1}
