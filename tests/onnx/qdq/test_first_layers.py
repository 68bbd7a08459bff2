import warnings

import numpy as np
import pytest

from klquant.backends.onnx import calibrate, prepare, quantize
from klquant.backends.onnx.model.graph import read_graph
from klquant.backends.onnx.qdq.first_layers import FASTER, first_layers
from support.onnx_models import build

DEPTHWISE = "d = Conv<group = 16, pads = [1, 1, 1, 1]>(a, w1)"


def network(first="a = Conv(x, w0)", second=DEPTHWISE, *, layers=20, channels=3, width=16):
    """Return a network of so many convolutions; from the third on they have 64 channels."""
    rest = " ".join(f"c{k} = Conv({'d' if k == 2 else f'c{k - 1}'}, v{k})" for k in range(2, layers))
    weights = {f"v{k}": (64, 16 if k == 2 else 64, 1, 1) for k in range(2, layers)}
    body = f"{first} {second} {rest} y = Identity(c{layers - 1})"
    return build(
        f"float[n, {channels}, 6, 6] x", "float y", body, w0=(width, channels, 3, 3), w1=(16, 1, 3, 3), **weights
    )


def names(model):
    return first_layers(read_graph(model))


def test_narrow_layers_at_the_start_are_named_up_to_a_tenth():
    assert names(network()) == ["conv0", "conv1"]
    assert names(network(layers=19)) == []
    narrow = "d0 = Conv(a, w1) d1 = Conv(d0, w1) d = Conv(d1, w1)"
    assert names(network(second=narrow.replace("Conv", "Conv<group = 16, pads = [1, 1, 1, 1]>"))) == ["conv0", "conv1"]


@pytest.mark.parametrize(("options", "expected"), [({"channels": 5}, []), ({"channels": 4}, ["conv0", "conv1"])])
def test_the_input_must_be_an_image(options, expected):
    assert names(network(**options)) == expected


def test_a_wide_first_layer_ends_it():
    model = network("a0 = Conv(x, w0) a = Relu(a0)", "d = Conv(a, w1)", width=40)
    graph = read_graph(model)
    assert first_layers(graph) == []


def test_quantize_leaves_them_in_floating_point_without_a_warning():
    model = network()
    x = np.random.default_rng(0).normal(size=(4, 3, 6, 6)).astype(np.float32)
    prepared = prepare(model)
    calibration = calibrate(prepared, [x], criterion="max")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = quantize(prepared, calibration, engine="onnxruntime")
    assert found.skipped == {"conv0": FASTER, "conv1": FASTER}
    assert not quantize(prepared, calibration, engine="openvino").skipped
