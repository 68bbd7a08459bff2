"""INT8 calibration of whole PyTorch models: fold, observe, search, simulate.

:func:`quantize` does everything; :class:`Quantizer` does it stage by stage; the functions below are the stages.
"""

from klquant.errors import MissingDependencyError

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise MissingDependencyError("klquant.backends.torch needs PyTorch: pip install 'klquant[torch]'") from error

from .calibration import LayerThreshold, search_thresholds
from .folding import Fold, fold_batch_norm, fold_relu
from .observing import collect_amax, collect_histograms
from .quantizer import Quantized, Quantizer, Stage, quantize
from .simulation import fake_quantize, quantize_weights, simulate

__all__ = [
    "Fold",
    "LayerThreshold",
    "Quantized",
    "Quantizer",
    "Stage",
    "collect_amax",
    "collect_histograms",
    "fake_quantize",
    "fold_batch_norm",
    "fold_relu",
    "quantize",
    "quantize_weights",
    "search_thresholds",
    "simulate",
]
