"""INT8 calibration of ONNX models: observe in onnxruntime, search, write Q/DQ that engines execute in INT8."""

from klquant.errors import MissingDependencyError

try:
    import onnx as _onnx  # noqa: F401
    import onnxruntime as _onnxruntime  # noqa: F401
except ImportError as error:
    raise MissingDependencyError(
        "klquant.backends.onnx needs onnx and onnxruntime: pip install 'klquant[onnx]'"
    ) from error

from ..calibration import Calibration
from ..settings import LayerOptions, Settings
from ..thresholds import LayerThreshold
from .calibrating import calibrate
from .inspecting import NodeReport, OperatorCount, inspect, summarize
from .preparing import prepare, save_model
from .quantizing import QuantizedModel, quantize
from .tensorrt_engine import check_tensorrt

__all__ = [
    "Calibration",
    "LayerOptions",
    "LayerThreshold",
    "NodeReport",
    "OperatorCount",
    "QuantizedModel",
    "Settings",
    "calibrate",
    "check_tensorrt",
    "inspect",
    "prepare",
    "quantize",
    "save_model",
    "summarize",
]
