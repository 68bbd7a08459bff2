"""INT8 calibration of whole PyTorch models: fold, observe, search, simulate.

:func:`quantize` does everything; :class:`Quantizer` does it stage by stage; the functions below are the stages.
"""

from klquant.errors import MissingDependencyError

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise MissingDependencyError("klquant.backends.torch needs PyTorch: pip install 'klquant[torch]'") from error

from ..calibration import Calibration
from ..settings import LayerOptions, Settings
from ..thresholds import LayerThreshold, search_thresholds
from .bias_correction import correct_bias
from .diagnosis import Diagnosis, LayerDiagnosis, diagnose
from .equalization import Equalized, apply_equalization, equalize
from .export import export_onnx
from .folding import Examination, examine, fold_batch_norm, fold_relu, plan_folds
from .fusing import Fold, apply_folds
from .observing import collect_amax, collect_histograms
from .pipeline import quantize, requantize
from .quantizer import Quantizer
from .selection import Choice, choose_criterion
from .simulation import fake_quantize, quantize_weights, saturate_like_engines, simulate
from .stages import Quantized, Stage

__all__ = [
    "Calibration",
    "Choice",
    "Diagnosis",
    "Equalized",
    "Examination",
    "Fold",
    "LayerDiagnosis",
    "LayerOptions",
    "LayerThreshold",
    "Quantized",
    "Quantizer",
    "Settings",
    "Stage",
    "apply_equalization",
    "apply_folds",
    "choose_criterion",
    "collect_amax",
    "collect_histograms",
    "correct_bias",
    "diagnose",
    "equalize",
    "examine",
    "export_onnx",
    "fake_quantize",
    "fold_batch_norm",
    "fold_relu",
    "plan_folds",
    "quantize",
    "quantize_weights",
    "requantize",
    "saturate_like_engines",
    "search_thresholds",
    "simulate",
]
