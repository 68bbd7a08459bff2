"""Engines that run ONNX models on one CPU thread, and the precision in which they run each layer."""

import io
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime

INT8 = "int8"
KERNELS = {  # kernels of onnxruntime
    **dict.fromkeys(("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat"), INT8),
    **dict.fromkeys(("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"), "f32"),
}
LAYERS = ("Convolution", "FullyConnected", "MatMul")  # layer types of OpenVINO


class Engine(NamedTuple):
    """A model that an engine has loaded."""

    run: Callable[[np.ndarray], np.ndarray]
    """From images to logits."""
    precisions: Counter
    """The number of its layers with weights by precision."""

    def layers(self):
        return ", ".join(f"{number} {precision}" for precision, number in self.precisions.most_common())


def in_onnxruntime(model):
    """Load a model into onnxruntime, with all its optimizations."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(path)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        kernels = [node.op_type for node in onnx.load(path).graph.node]
    name = session.get_inputs()[0].name
    precisions = Counter(KERNELS[kernel] for kernel in kernels if kernel in KERNELS)
    return Engine(lambda images: session.run(None, {name: images})[0], precisions)


def in_openvino(model, precision):
    """Load a model into OpenVINO. `precision` is for the layers that are not INT8; None is OpenVINO's default."""
    import openvino

    core = openvino.Core()
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1}
    hints |= {"INFERENCE_PRECISION_HINT": precision} if precision else {}
    compiled = core.compile_model(core.read_model(io.BytesIO(model.SerializeToString())), "CPU", hints)
    request = compiled.create_infer_request()
    nodes = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    inputs = (str(node["runtimePrecision"].value) for node in nodes if node["layerType"].value in LAYERS)
    precisions = Counter(INT8 if precision in ("i8", "u8") else precision for precision in inputs)
    shared = {"share_inputs": True, "share_outputs": True}  # or the time would include copies made for Python
    return Engine(lambda images: request.infer([images], **shared)[0].copy(), precisions)
