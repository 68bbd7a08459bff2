"""Small ONNX models with Q/DQ pairs, built node by node. Each node has the name of its output."""

import numpy as np
import onnx
from onnx import helper, numpy_helper

INT8, UINT8 = (np.int8, 0), (np.uint8, 0)
INT8_LOWEST, UINT8_MIDDLE = (np.int8, -128), (np.uint8, 128)
SCALE = 0.05
WEIGHT_SCALE = 0.01


class Builder:
    """Collects nodes and constants. Each method returns the name of the tensor that it adds."""

    def __init__(self, opset=17):
        self.nodes, self.constants, self.opset = [], [], opset

    def constant(self, value):
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, op_type, *inputs, **attributes):
        name = attributes.pop("name", f"{op_type.lower()}{sum(node.op_type == op_type for node in self.nodes)}")
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=name, **attributes))
        return name

    def qdq(self, tensor, grid=INT8, scale=SCALE, **attributes):
        """Quantize and dequantize with a (dtype, zero point)."""
        dtype, zero_point = grid
        scale = np.asarray(scale, np.float32)
        parameters = self.constant(scale), self.constant(np.full(scale.shape, zero_point, dtype))
        return self.node(
            "DequantizeLinear",
            self.node("QuantizeLinear", tensor, *parameters, **attributes),
            *parameters,
            **attributes,
        )

    def dequantized(self, values, scale, axis=None):
        """Dequantize integers, with one scale or with one for each index of an axis."""
        values = np.asarray(values)
        scales = (
            np.float32(scale) if axis is None else np.linspace(scale, 2 * scale, values.shape[axis], dtype=np.float32)
        )
        parameters = self.constant(scales), self.constant(np.zeros(np.shape(scales), values.dtype))
        return self.node("DequantizeLinear", self.constant(values), *parameters, axis=1 if axis is None else axis)

    def weight(self, *shape, axis=0):
        values = np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8)
        return self.dequantized(values, WEIGHT_SCALE, axis)

    def bias(self, size, scale=SCALE * WEIGHT_SCALE):
        return self.dequantized(np.arange(size, dtype=np.int32), scale, 0)

    def floats(self, *shape):
        return self.constant(np.random.default_rng(1).normal(size=shape).astype(np.float32))

    def conv(self, tensor, outputs=4, inputs=4, **attributes):
        return self.node(
            "Conv", tensor, self.weight(outputs, inputs, 3, 3), self.floats(outputs), pads=[1] * 4, **attributes
        )

    def gemm(self, tensor, outputs=8, inputs=16, bias=None, axis=0, **attributes):
        more = [] if bias is None else [bias]
        return self.node("Gemm", tensor, self.weight(outputs, inputs, axis=axis), *more, transB=1, **attributes)

    def model(self, *outputs, shape=(1, 4, 8, 8), inputs=("x",), types=None, input_type=onnx.TensorProto.FLOAT):
        """Return the checked model. All its inputs have the same shape."""
        given = [helper.make_tensor_value_info(name, input_type, shape) for name in inputs]
        kinds = types or [onnx.TensorProto.FLOAT] * len(outputs)
        made = [helper.make_tensor_value_info(*pair, None) for pair in zip(outputs, kinds, strict=True)]
        graph = helper.make_graph(self.nodes, "small", given, made, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def residual_block(signed, rectified, *, sum_of_quantized):
    """Return conv, relu, conv, add, relu, global pooling, flatten and gemm, with these grids.

    onnxruntime needs both inputs of the sum quantized, TensorRT only the shortcut.
    """
    build = Builder()
    x = build.qdq("x", signed)
    branch = build.qdq(build.node("Relu", build.conv(x)), rectified)
    branch = build.conv(branch)
    if sum_of_quantized:
        branch = build.qdq(branch, signed)
    y = build.qdq(build.node("Relu", build.node("Add", branch, x)), rectified)
    y = build.qdq(build.node("GlobalAveragePool", y), rectified)
    y = build.qdq(build.node("Flatten", y), rectified)
    return build.model(build.qdq(build.gemm(y, 10, 4, build.floats(10)), signed))
