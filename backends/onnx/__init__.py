"""INT8 calibration of ONNX models: observe them in onnxruntime, search thresholds, write Q/DQ that engines run in INT8.

:func:`calibrate` returns a :class:`Calibration` (with :class:`Settings`, :class:`LayerOptions` and
:class:`LayerThreshold`), and :func:`quantize` turns it into a :class:`QDQModel`. Both call :func:`prepare` first,
or take the :class:`Prepared` model that it returned; tensors and nodes go by their names in that model.
:func:`smooth` and :func:`equalize` change a float model so that it is more accurate in INT8; calibrate and quantize
what they return.
:func:`open_observer` and :func:`empty_calibration` serve passes over parts of the data.
:func:`quantizable_tensors` lists the tensors that an engine needs thresholds for.
:func:`inspect` returns a :class:`NodeReport` for each node, :func:`summarize` an :class:`OperatorCount` for each
operator, and :func:`check_tensorrt` each :class:`Violation` of TensorRT's rules; :func:`slow_in_tensorrt` lists layers
that gain no speed there. :func:`verify` runs a
quantized model in its engine and returns a :class:`Verification` with a :class:`TensorCheck` of each tensor.
:func:`sensitivity` returns a :class:`Sensitivity`, with the :class:`QuantizerCost` of each quantizer.
:func:`compare` returns a :class:`Comparison` of a float model with its quantized form, with an
:class:`OutputComparison` of each output. :func:`tune` returns a :class:`Tuned` model, with a :class:`Trace` of every
:class:`Trial`: its :class:`Recipe` and what was :class:`Measured`. :func:`auto` tries everything once and returns an
:class:`Automatic`, with each :class:`Attempt` and a verdict.
"""

from klquant.errors import MissingDependencyError

try:
    import onnx as _onnx  # noqa: F401
    import onnxruntime as _onnxruntime  # noqa: F401
except ImportError as error:
    raise MissingDependencyError(
        "klquant.backends.onnx needs onnx and onnxruntime: pip install 'klquant[onnx]'"
    ) from error

from ..accuracy.comparison import Comparison
from ..accuracy.outputs import OutputComparison
from ..accuracy.trials import Measured, Recipe, Trace, Trial, Tuned
from ..automatic import Attempt, Automatic
from ..calibration import Calibration
from ..settings import LayerOptions, Settings
from ..thresholds import LayerThreshold
from .accuracy.comparison import compare
from .accuracy.ranking import QuantizerCost, Sensitivity, sensitivity
from .accuracy.tuning import tune
from .automatic import auto
from .calibration import calibrate, empty_calibration, open_observer
from .engines.inspection import NodeReport, OperatorCount, inspect, summarize
from .engines.tensorrt import Violation, check_tensorrt
from .engines.tensorrt_exclusions import slow_in_tensorrt
from .model.preparation import Prepared, prepare
from .qdq_model import QDQModel
from .quantization import quantizable_tensors, quantize
from .scaling.equalization import equalize
from .scaling.smooth_quant import smooth
from .tensor_checks import TensorCheck, Verification
from .verification import verify

__all__ = [
    "Attempt",
    "Automatic",
    "Calibration",
    "Comparison",
    "LayerOptions",
    "LayerThreshold",
    "Measured",
    "NodeReport",
    "OperatorCount",
    "OutputComparison",
    "Prepared",
    "QDQModel",
    "QuantizerCost",
    "Recipe",
    "Sensitivity",
    "Settings",
    "TensorCheck",
    "Trace",
    "Trial",
    "Tuned",
    "Verification",
    "Violation",
    "auto",
    "calibrate",
    "check_tensorrt",
    "compare",
    "empty_calibration",
    "equalize",
    "inspect",
    "open_observer",
    "prepare",
    "quantizable_tensors",
    "quantize",
    "sensitivity",
    "slow_in_tensorrt",
    "smooth",
    "summarize",
    "tune",
    "verify",
]


def __dir__() -> list[str]:
    return __all__
