"""INT8 calibration of ONNX models: observe in onnxruntime, search, write Q/DQ that engines execute in INT8.

:func:`calibrate` gives a :class:`Calibration` (its parts: :class:`Settings`, :class:`LayerOptions`,
:class:`LayerThreshold`); :func:`open_observer` and :func:`empty_calibration` are its parts for passes over parts of the
data. :func:`quantize` makes a :class:`QuantizedModel` of it. Both bring a model into one form by
:func:`prepare`, whose names are the ones that count. :func:`inspect` gives a :class:`NodeReport` for each node,
:func:`summarize` an :class:`OperatorCount` for each operator; :func:`check_tensorrt` gives each :class:`Violation`
of TensorRT's rules.
"""

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
from .calibration import calibrate, empty_calibration, open_observer
from .engines.inspection import NodeReport, OperatorCount, inspect, summarize
from .engines.tensorrt import Violation, check_tensorrt
from .model.preparation import prepare
from .quantization import QuantizedModel, quantize

__all__ = [
    "Calibration",
    "LayerOptions",
    "LayerThreshold",
    "NodeReport",
    "OperatorCount",
    "QuantizedModel",
    "Settings",
    "Violation",
    "calibrate",
    "check_tensorrt",
    "empty_calibration",
    "inspect",
    "open_observer",
    "prepare",
    "quantize",
    "summarize",
]
