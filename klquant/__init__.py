"""INT8 entropy (KL-divergence) calibration: pure functions on NumPy and JAX arrays.

- :func:`histogram` makes a :class:`Histogram`, :func:`merge` adds two
- :func:`optimal_threshold` finds the :class:`Threshold` by the least divergence; :func:`max_threshold`,
  :func:`percentile_threshold` and :func:`mse_threshold` find it otherwise
- :func:`divergence_curve` and :func:`mse_curve` judge every candidate
- :func:`smooth`, :func:`kl_divergence`, :func:`merge_partition`, :func:`quantized_distribution`: parts of the search
- :func:`scale`, :func:`quantize`, :func:`dequantize`, :func:`fake_quantize`: what is done with a threshold
- errors: all are a :class:`KLQuantError`, as the modules that raise them tell: :class:`ArrayTypeError`,
  :class:`InvalidInputError`, :class:`InfeasibleError`, :class:`StageError`, :class:`ModelError`, :class:`PeerError`,
  :class:`MissingDependencyError`; and a warning, :class:`CalibrationWarning`

Imported on demand: ``klquant.backends.torch`` and ``klquant.backends.onnx`` for whole models,
``klquant.backends.formats`` for tables of scales, ``klquant.backends.report`` for pages about a calibration,
``klquant.plots`` for pictures, ``klquant.presets`` for thresholds as other tools choose them, ``klquant.reference`` for
the algorithm in plain loops.
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


def __dir__() -> list[str]:
    return sorted({*__all__, *({"backends", "errors", "plots", "presets", "reference"} & globals().keys())})
