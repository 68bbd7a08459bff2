"""INT8 calibration of whole PyTorch models: fold, observe, search, simulate.

:func:`quantize` does everything and returns a :class:`QuantizedModel`. :func:`requantize` does it without data, from a
saved :class:`Calibration`, which holds :class:`Settings`, :class:`LayerOptions` and each :class:`LayerThreshold`.
:func:`export_onnx` returns an ONNX model for an engine; :func:`saturate_like_engines` makes the simulation equal to it,
and :func:`round_embeddings` rounds tables of embeddings as well.

:class:`Quantizer` does the same :class:`Stage` by stage. Each stage is a function as well:

- :func:`examine` (an :class:`Examination`) decides each :class:`Fold` and finds each :class:`Product`, a call of a
  function that multiplies, or a residual sum; :func:`apply_folds` applies them;
  :func:`fold_batch_norm` and :func:`fold_relu` do both for one kind
- :func:`equalize` (each pair is :class:`Equalized`); :func:`apply_equalization` does it again without data;
  :func:`smooth` makes another float model, to be quantized instead
- :func:`quantize_weights`, :func:`collect_amax`, :func:`collect_histograms`, :func:`search_thresholds`, or
  :func:`choose_criterion` (a :class:`Choice` for each tensor)
- :func:`simulate`, which rounds by :func:`fake_quantize`; :func:`correct_bias`
- :func:`unfreeze_weights` and :func:`freeze_weights`, to fine-tune in between
- :func:`diagnose` (a :class:`Diagnosis`, with a :class:`LayerDiagnosis` for each layer)

:func:`compare` returns a :class:`Comparison` of a module with its quantized form, with an :class:`OutputComparison` of
each output. :func:`tune` returns a :class:`Tuned` model, with a :class:`Trace` of every :class:`Trial`: its
:class:`Recipe` and what was :class:`Measured`. :func:`auto` tries everything once and returns an :class:`Automatic`,
with each :class:`Attempt` and a verdict.
"""

from klquant.errors import MissingDependencyError

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise MissingDependencyError("klquant.backends.torch needs PyTorch: pip install 'klquant[torch]'") from error

from ..accuracy.comparison import Comparison
from ..accuracy.criterion_choice import Choice
from ..accuracy.outputs import OutputComparison
from ..accuracy.trials import Measured, Recipe, Trace, Trial, Tuned
from ..automatic import Attempt, Automatic
from ..calibration import Calibration
from ..settings import LayerOptions, Settings
from ..thresholds import LayerThreshold, search_thresholds
from .accuracy.criterion_choice import choose_criterion
from .accuracy.diagnosis import Diagnosis, LayerDiagnosis, diagnose
from .accuracy.outputs import compare
from .accuracy.tuning import tune
from .automatic import auto
from .correction.bias_correction import correct_bias
from .correction.equalization import Equalized, apply_equalization, equalize
from .correction.smooth_quant import smooth
from .embeddings import round_embeddings
from .export.api import export_onnx
from .finetuning import freeze_weights, unfreeze_weights
from .folding.api import Examination, examine, fold_batch_norm, fold_relu
from .folding.apply import Fold, apply_folds
from .model.products import Product
from .observation.passes import collect_amax, collect_histograms
from .pipeline import quantize, requantize
from .quantizer import Quantizer
from .simulation import fake_quantize, quantize_weights, saturate_like_engines, simulate
from .stages import QuantizedModel, Stage

__all__ = [
    "Attempt",
    "Automatic",
    "Calibration",
    "Choice",
    "Comparison",
    "Diagnosis",
    "Equalized",
    "Examination",
    "Fold",
    "LayerDiagnosis",
    "LayerOptions",
    "LayerThreshold",
    "Measured",
    "OutputComparison",
    "Product",
    "QuantizedModel",
    "Quantizer",
    "Recipe",
    "Settings",
    "Stage",
    "Trace",
    "Trial",
    "Tuned",
    "apply_equalization",
    "apply_folds",
    "auto",
    "choose_criterion",
    "collect_amax",
    "collect_histograms",
    "compare",
    "correct_bias",
    "diagnose",
    "equalize",
    "examine",
    "export_onnx",
    "fake_quantize",
    "fold_batch_norm",
    "fold_relu",
    "freeze_weights",
    "quantize",
    "quantize_weights",
    "requantize",
    "round_embeddings",
    "saturate_like_engines",
    "search_thresholds",
    "simulate",
    "smooth",
    "tune",
    "unfreeze_weights",
]


def __dir__() -> list[str]:
    return __all__
