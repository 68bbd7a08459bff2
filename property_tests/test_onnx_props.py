"""Small random ONNX graphs: whatever is quantized loads and runs in its engine, which computes what the model says."""

import warnings

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper, parser

from klquant.errors import CalibrationWarning, ModelError

pytest.importorskip("onnxruntime", reason="needs onnxruntime")
from klquant.backends.onnx import calibrate, prepare, quantize, verify

CHANNELS = 4
NIGHTLY = settings.default.max_examples >= 1000  # other graphs every night, the same ones by day
SLOW = settings(
    suppress_health_check=[HealthCheck.too_slow],
    max_examples=settings.default.max_examples // 2,
    derandomize=not NIGHTLY,
)


class Graph:
    """A graph of NCHW tensors under construction; every step appends one operator in the text form of ONNX."""

    def __init__(self, draw):
        self.draw, self.lines, self.weights, self.name = draw, [], {}, "x"
        self.opset = draw(st.sampled_from([17, 21]), "opset")
        self.rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), "seed"))

    def add(self, operator, *inputs, attributes=""):
        result = f"t{len(self.lines)}"
        arguments = ", ".join((self.name, *inputs))
        self.lines.append(f"{result} = {operator}{f' <{attributes}>' if attributes else ''} ({arguments})")
        self.name, before = result, self.name
        return before

    def weight(self, *shape, scale=0.5):
        name = f"w{len(self.weights)}"
        self.weights[name] = (self.rng.normal(size=shape) * scale).astype(np.float32)
        return name

    def axes(self, *axes):
        self.weights[f"axes{len(self.lines)}"] = np.array(axes)
        return f"axes{len(self.lines)}"

    def conv(self):
        weight = self.weight(CHANNELS, CHANNELS, 3, 3)
        for channel in self.draw(st.sets(st.integers(0, CHANNELS - 1), max_size=2), "small channels"):
            self.weights[weight][channel] *= self.draw(st.sampled_from([0.0, 1e-12, 1e-6, 1e-3]), "their size")
        bias = [self.weight(CHANNELS, scale=self.draw(st.sampled_from([0.0, 0.1, 100.0]), "bias"))]
        self.add(
            "Conv", weight, *(bias if self.draw(st.booleans(), "has bias") else []), attributes="pads = [1, 1, 1, 1]"
        )

    def relu(self):
        self.add("Relu")

    def leaky(self):
        self.add("LeakyRelu", attributes="alpha = 0.1")

    def sigmoid(self):
        self.add("Sigmoid")

    def shortcut(self):
        if self.lines:
            self.add("Add", "x")

    def maxpool(self):
        self.add("MaxPool", attributes="kernel_shape = [2, 2], strides = [1, 1], pads = [0, 0, 1, 1]")

    def average(self):
        options = self.draw(st.sampled_from(["", ", ceil_mode = 1", ", count_include_pad = 1"]), "average")
        self.add("AveragePool", attributes=f"kernel_shape = [3, 3], strides = [1, 1], pads = [1, 1, 1, 1]{options}")

    def concat_and_mix(self):
        self.add("Concat", self.name, attributes="axis = 1")
        self.add("Conv", self.weight(CHANNELS, 2 * CHANNELS, 1, 1))

    def matmul(self):
        shape = self.draw(st.sampled_from([(8, 8), (CHANNELS, 8, 8), (1, 8, 8)]), "weight of a MatMul")
        self.add("MatMul", self.weight(*shape))

    def layer_norm(self):
        self.add("LayerNormalization", self.weight(8), attributes="axis = -1")

    def twice(self):
        self.add("Add", self.name)

    def excite(self):
        before = self.add("GlobalAveragePool")
        self.add("Mul", before)

    def transposed(self):
        group = self.draw(st.sampled_from([1, 2]), "groups")
        self.add("ConvTranspose", self.weight(CHANNELS, CHANNELS // group, 1, 1), attributes=f"group = {group}")

    def largest(self):
        if self.opset < 18:
            self.add("ReduceMax", attributes="axes = [1]")
        else:
            self.add("ReduceMax", self.axes(1))
        self.add("Conv", self.weight(CHANNELS, 1, 1, 1))

    STEPS = (
        *(conv, relu, leaky, sigmoid, shortcut, maxpool, average, concat_and_mix, matmul, layer_norm),
        *(twice, excite, transposed, largest),
    )

    def model(self):
        shape = f"float[n, {CHANNELS}, 8, 8]"
        if self.draw(st.booleans(), "ends in a Gemm"):
            self.lines.append(f"p = GlobalAveragePool ({self.name}) q = Flatten (p)")
            self.name = "q"
            bias = self.draw(st.sampled_from([[], [(3,)], [(1, 3)], [(1,)], [()]]), "bias of the Gemm")
            self.add("Gemm", self.weight(CHANNELS, 3), *(self.weight(*one) for one in bias))
            shape = "float[n, 3]"
        body = "\n".join(self.lines)
        opset = f'<ir_version: 8, opset_import: ["": {self.opset}]>'
        head = f"{opset} g (float[n, {CHANNELS}, 8, 8] x) => ({shape} {self.name})"
        model = parser.parse_model(f"{head} {{ {body} }}")
        used = {name for node in model.graph.node for name in node.input}
        tensors = (numpy_helper.from_array(value, name) for name, value in self.weights.items() if name in used)
        model.graph.initializer.extend(tensors)
        onnx.checker.check_model(model)
        return model


@st.composite
def models(draw):
    graph = Graph(draw)
    graph.conv()
    for step in draw(st.lists(st.sampled_from(Graph.STEPS), max_size=5), "steps"):
        step(graph)
    return graph.model()


ONNXRUNTIME_1_30 = "two nodes with same node name"  # it joins a Conv with each of two Relus behind it, as one node


def batch(seed, scale):
    return (np.random.default_rng(seed).normal(size=(3, CHANNELS, 8, 8)) * scale).astype(np.float32)


@pytest.mark.parametrize("engine", ["onnxruntime", "tensorrt", "openvino"])
@SLOW
@given(model=models(), seed=st.integers(0, 99), scale=st.sampled_from([1e-2, 1.0, 30.0]))
def test_the_engine_computes_what_is_written(engine, model, seed, scale):
    if engine == "openvino":
        openvino = pytest.importorskip("openvino", reason="needs OpenVINO")
        if openvino.__version__ < "2026":
            pytest.skip("what older versions of OpenVINO compute wrongly is not known")
    data = [batch(seed, scale), batch(seed + 1, scale)]
    prepared = prepare(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        quantized = quantize(prepared, calibrate(prepared, data, criterion="max"), engine=engine)
    try:
        found = verify(quantized.model, data[:1], engine)
    except ModelError as error:
        assume(ONNXRUNTIME_1_30 not in str(error))
        raise
    assert found.wrong == [], str(found)
