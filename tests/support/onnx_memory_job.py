"""Calibrate on a number of images of 64 x 64 pixels, and print the peak memory in KiB: see onnx/test_memory.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # to run as a script


import numpy as np
import onnx

from klquant.backends.onnx import calibrate
from support import resident

NETWORK = """
<ir_version: 8, opset_import: ["": 17]>
network (float[batch, 1, 64, 64] images) => (float[batch, 10] logits) {
  a = Conv (images, w1)
  b = Relu (a)
  c = Conv <strides = [2, 2]> (b, w2)
  d = Relu (c)
  e = Flatten (d)
  logits = MatMul (e, w3)
}
"""
SHAPES = {"w1": (8, 1, 3, 3), "w2": (8, 8, 3, 3), "w3": (8 * 30 * 30, 10)}


class Images:
    """Batches of 32 images, each made when it is read; the last one may be smaller."""

    def __init__(self, number):
        self.number = number

    def __iter__(self):
        for begin in range(0, self.number, 32):
            shape = (min(32, self.number - begin), 1, 64, 64)
            yield np.random.default_rng(begin).standard_normal(shape, np.float32)


def network():
    model, random = onnx.parser.parse_model(NETWORK), np.random.default_rng(0)
    weights = ((random.standard_normal(shape, np.float32) / 8, name) for name, shape in SHAPES.items())
    model.graph.initializer.extend(onnx.numpy_helper.from_array(*weight) for weight in weights)
    return model


if __name__ == "__main__":
    number, keep_bytes = map(int, sys.argv[1:])
    calibrate(network(), Images(number), criterion="max", keep_bytes=keep_bytes)
    print(resident.peak())  # noqa: T201
