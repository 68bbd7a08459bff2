"""Optimize a model with onnxruntime."""

from collections.abc import Collection
from pathlib import Path

import onnx
import onnxruntime

from .saving import MIN_BYTES

MAX_FOLDED = 2**26  # bytes of a folded constant: a few bytes of a model may ask for terabytes


def optimize(
    path: Path, level: onnxruntime.GraphOptimizationLevel, *, disabled: Collection[str] = ()
) -> onnx.ModelProto:
    """Return the optimized model; its large weights stay in a file beside `path`.

    A constant that would take more than `MAX_FOLDED` bytes, and more than twice the model, is not folded.
    """
    target = path.with_name("optimized.onnx")
    max_folded = max(MAX_FOLDED, 2 * sum(file.stat().st_size for file in path.parent.iterdir()))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # errors are raised
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", str(max_folded))
    key = "session.optimized_model_external_initializers"
    options.add_session_config_entry(f"{key}_file_name", f"{target.name}.data")
    options.add_session_config_entry(f"{key}_min_size_in_bytes", str(MIN_BYTES))
    cpu = ["CPUExecutionProvider"]  # wherever the model will run: names and weights are the same
    onnxruntime.InferenceSession(str(path), options, providers=cpu, disabled_optimizers=disabled)
    return onnx.load(str(target), load_external_data=False)
