"""INT8 entropy (KL-divergence) calibration: pure functions on NumPy and JAX arrays.

``klquant.backends.torch`` calibrates whole PyTorch models; it is imported on demand.
"""

from klquant._result import Threshold
from klquant.affine import dequantize, fake_quantize, quantize, scale
from klquant.criteria import max_threshold, mse_curve, mse_threshold, percentile_threshold
from klquant.divergence import kl_divergence, smooth
from klquant.errors import (
    ArrayTypeError,
    CalibrationWarning,
    InfeasibleError,
    InvalidInputError,
    KLQuantError,
    MissingDependencyError,
    ModelError,
    PeerError,
    StageError,
)
from klquant.histogram import Histogram, histogram, merge
from klquant.merging import merge_partition, quantized_distribution
from klquant.threshold import divergence_curve, optimal_threshold

__version__ = "0.1.0"

__all__ = [
    "ArrayTypeError",
    "CalibrationWarning",
    "Histogram",
    "InfeasibleError",
    "InvalidInputError",
    "KLQuantError",
    "MissingDependencyError",
    "ModelError",
    "PeerError",
    "StageError",
    "Threshold",
    "dequantize",
    "divergence_curve",
    "fake_quantize",
    "histogram",
    "kl_divergence",
    "max_threshold",
    "merge",
    "merge_partition",
    "mse_curve",
    "mse_threshold",
    "optimal_threshold",
    "percentile_threshold",
    "quantize",
    "quantized_distribution",
    "scale",
    "smooth",
]
