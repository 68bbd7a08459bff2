"""Small random ONNX graphs: changing their weights before quantization keeps what they compute, up to rounding."""

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper, parser

pytest.importorskip("onnxruntime", reason="needs onnxruntime")
from klquant.backends.onnx import equalize, prepare, smooth
from support.onnx_models import run_all

WIDTH = 8
SLOW = settings(suppress_health_check=[HealthCheck.too_slow], max_examples=settings.default.max_examples // 2)


class Lines:
    """A graph under construction, from tensors of one shape: the text form of ONNX, and constants."""

    def __init__(self, draw):
        self.draw, self.lines, self.constants, self.names = draw, [], {}, ["x"]
        self.rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), "seed"))

    def constant(self, *shape):
        """Return the name of a new constant whose channels have very different ranges, or of an old one."""
        old = [name for name, value in self.constants.items() if value.shape == shape]
        if old and self.draw(st.booleans(), "shared constant"):
            return self.draw(st.sampled_from(old), "which")
        name = f"w{len(self.constants)}"
        axis = 0 if len(shape) == 4 else -1  # of convolutions
        spread = np.exp(self.rng.normal(size=shape[axis]) * self.draw(st.sampled_from([0, 1, 3]), "spread"))
        spread = spread.reshape(-1, 1, 1, 1) if len(shape) == 4 else spread
        self.constants[name] = (self.rng.normal(size=shape) * spread).astype(np.float32)
        return name

    def add(self, operator, *inputs, attributes=""):
        text = f"{operator}{f' <{attributes}>' if attributes else ''} ({', '.join(inputs)})"
        self.lines.append(f"t{len(self.lines)} = {text}")
        self.names.append(f"t{len(self.lines) - 1}")

    def step(self):
        kind = self.draw(st.sampled_from(["MatMul", "MatMul", "norm", "Add", "Mul", "Div", "curve", "join"]), "step")
        last = self.names[-1] if self.draw(st.booleans(), "in a row") else self.draw(st.sampled_from(self.names), "of")
        if kind == "MatMul":
            self.add("MatMul", last, self.constant(WIDTH, WIDTH))
        elif kind == "norm":
            bias = [self.constant(WIDTH)] if self.draw(st.booleans(), "has bias") else []
            self.add("LayerNormalization", last, self.constant(WIDTH), *bias)
        elif kind == "curve":
            self.add(self.draw(st.sampled_from(["Relu", "LeakyRelu", "Sigmoid", "Identity"]), "curve"), last)
        elif kind == "join":
            self.add(
                self.draw(st.sampled_from(["Add", "Mul"]), "how"), last, self.draw(st.sampled_from(self.names), "b")
            )
        else:
            self.add(kind, *self.draw(st.permutations([last, self.constant(WIDTH)]), "order"))

    def convolution(self):
        kind = self.draw(
            st.sampled_from(["Conv", "Conv", "depthwise", "ConvTranspose", "pool", "curve", "join"]), "step"
        )
        last = (
            self.names[-1] if self.draw(st.integers(0, 3), "in a row") else self.draw(st.sampled_from(self.names), "of")
        )
        bias = [self.constant(WIDTH)] if self.draw(st.booleans(), "has bias") else []
        if kind in ("Conv", "ConvTranspose"):
            self.add(kind, last, self.constant(WIDTH, WIDTH, 1, 1), *bias)
        elif kind == "depthwise":
            attributes = f"group = {WIDTH}, pads = [1, 1, 1, 1]"
            self.add("Conv", last, self.constant(WIDTH, 1, 3, 3), *bias, attributes=attributes)
        elif kind == "pool":
            attributes = "kernel_shape = [2, 2], pads = [0, 0, 1, 1]"
            self.add(self.draw(st.sampled_from(["MaxPool", "AveragePool"]), "pool"), last, attributes=attributes)
        elif kind == "curve":
            self.add(self.draw(st.sampled_from(["Relu", "LeakyRelu", "Sigmoid"]), "curve"), last)
        else:
            self.add("Add", last, self.draw(st.sampled_from(self.names), "b"))

    def model(self, shape):
        body = "\n".join(self.lines)
        outputs = {self.names[-1], *self.draw(st.sets(st.sampled_from(self.names[1:]), max_size=1), "more outputs")}
        listed = ", ".join(f"float[n, {shape}] {name}" for name in sorted(outputs))
        head = f'<ir_version: 8, opset_import: ["": 17]> g (float[n, {shape}] x) => ({listed})'
        model = parser.parse_model(f"{head} {{ {body} }}")
        model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in self.constants.items())
        onnx.checker.check_model(model)
        return model


@st.composite
def sequence_models(draw):
    lines = Lines(draw)
    for _ in range(draw(st.integers(1, 8), "steps")):
        lines.step()
    return lines.model(f"4, {WIDTH}")


@st.composite
def image_models(draw):
    lines = Lines(draw)
    for _ in range(draw(st.integers(2, 8), "steps")):
        lines.convolution()
    return lines.model(f"{WIDTH}, 5, 5")


def outputs(model, x):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


def batch(seed, *shape):
    return np.random.default_rng(seed).normal(size=(3, *shape)).astype(np.float32)


def check_same(model, changed, x):
    """Compare two models, and allow what rounding of the input by 1e-4 does to the first."""
    nudged = outputs(model, x * (1 + np.float32(1e-6)))
    for one, found, near in zip(outputs(model, x), outputs(changed, x), nudged, strict=True):
        rounding = 1e-5 * np.abs(one).max() + 100 * np.abs(near - one).max()
        np.testing.assert_allclose(found, one, rtol=1e-3, atol=rounding + 1e-7)
    assert prepare(changed)


@SLOW
@given(model=sequence_models(), seed=st.integers(0, 99), alpha=st.sampled_from([None, 0.0, 0.5, 1.0]))
def test_smooth_keeps_the_function(model, seed, alpha):
    data = [batch(seed, 4, WIDTH), batch(seed + 1, 4, WIDTH)]
    tensors = [tensor for x in data for tensor in run_all(model, x=x).values()]
    assume(all(np.isfinite(tensor).all() for tensor in tensors))  # a Div may divide by 0
    check_same(model, smooth(model, data, alpha=alpha), data[0])


@SLOW
@given(model=image_models(), seed=st.integers(0, 99), alpha=st.sampled_from([None, 0.0, 0.5, 1.0]))
def test_smooth_keeps_the_function_of_convolutions(model, seed, alpha):
    data = [batch(seed, WIDTH, 5, 5), batch(seed + 1, WIDTH, 5, 5)]
    check_same(model, smooth(model, data, alpha=alpha), data[0])


@SLOW
@given(model=image_models(), seed=st.integers(0, 99))
def test_equalize_keeps_the_function(model, seed):
    x = batch(seed, WIDTH, 5, 5)
    equalized = equalize(model)
    for one, found in zip(outputs(model, x), outputs(equalized, x), strict=True):
        np.testing.assert_allclose(found, one, rtol=1e-4, atol=1e-5 * np.abs(one).max() + 1e-30)
    assert prepare(equalized)
