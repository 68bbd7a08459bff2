"""INT8 entropy (KL-divergence) calibration: pure functions on NumPy and JAX arrays.

- Histograms: :func:`histogram` counts data into a :class:`Histogram`, and :func:`merge` adds two of them.
- Thresholds: :func:`optimal_threshold` minimises the KL divergence. :func:`max_threshold`,
  :func:`percentile_threshold` and :func:`mse_threshold` use other criteria. All return a :class:`Threshold`.
- Curves: :func:`divergence_curve` and :func:`mse_curve` return the criterion at every candidate threshold.
- Steps of the search: :func:`smooth`, :func:`kl_divergence`, :func:`merge_partition`, :func:`quantized_distribution`.
- Quantization: :func:`scale`, :func:`quantize`, :func:`dequantize`, :func:`fake_quantize`.
- Errors: each is a :class:`KLQuantError`: :class:`ArrayTypeError`, :class:`InvalidInputError`,
  :class:`InfeasibleError`, :class:`StageError`, :class:`ModelError`, :class:`PeerError`,
  :class:`MissingDependencyError`. There is one warning, :class:`CalibrationWarning`.

Import these where you need them: ``klquant.backends.torch`` and ``klquant.backends.onnx`` calibrate whole models,
``klquant.backends.formats`` reads and writes calibration tables, ``klquant.backends.report`` writes HTML and JSON
reports, ``klquant.plots`` draws curves and histograms, ``klquant.presets`` reproduces the thresholds of other tools,
``klquant.reference`` is the algorithm in plain loops, and ``klquant.testing`` has strategies and oracles for property
tests.
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

__version__ = "0.2.0"

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
    return sorted({*__all__, *({"backends", "errors", "plots", "presets", "reference", "testing"} & globals().keys())})
