"""INT8 calibration of JAX functions, which then multiply integers.

:func:`quantize` takes any function ``f(params, *inputs)`` and returns a :class:`QuantizedFunction`; :func:`calibrate`
makes its :class:`Calibration`, which holds :class:`Settings`, :class:`LayerOptions` and each :class:`LayerThreshold`.
:func:`requantize` does without data, and :func:`export` makes StableHLO. :func:`compare`
returns a :class:`Comparison` of a function with its quantized form, with an :class:`OutputComparison` of each output.
:func:`sensitivity` returns the :class:`ProductCost` of each product. :func:`auto` tries every way once and returns an
:class:`Automatic`, with an :class:`Attempt` each. :func:`tune` returns a :class:`Tuned` function,
with a :class:`Trace` of every :class:`Trial`: its :class:`Recipe` and what was :class:`Measured`. With
``jax.distributed``, :class:`JaxProcesses` calibrate together.
"""

from klquant.errors import MissingDependencyError

try:
    import jax as _jax  # noqa: F401
except ImportError as error:
    raise MissingDependencyError("klquant.backends.jax needs JAX: pip install 'klquant[jax]'") from error

from ..accuracy.comparison import Comparison
from ..accuracy.outputs import OutputComparison
from ..accuracy.trials import Measured, Recipe, Trace, Trial, Tuned
from ..automatic import Attempt, Automatic
from ..calibration import Calibration
from ..settings import LayerOptions, Settings
from ..thresholds import LayerThreshold
from .accuracy.automatic import auto
from .accuracy.comparison import compare
from .accuracy.sensitivity import ProductCost, sensitivity
from .accuracy.tuning import tune
from .calibration import calibrate
from .observation.processes import JaxProcesses
from .quantization import quantize, requantize
from .quantized_function import QuantizedFunction
from .stablehlo import export

__all__ = [
    "Attempt",
    "Automatic",
    "Calibration",
    "Comparison",
    "JaxProcesses",
    "LayerOptions",
    "LayerThreshold",
    "Measured",
    "OutputComparison",
    "ProductCost",
    "QuantizedFunction",
    "Recipe",
    "Settings",
    "Trace",
    "Trial",
    "Tuned",
    "auto",
    "calibrate",
    "compare",
    "export",
    "quantize",
    "requantize",
    "sensitivity",
    "tune",
]


def __dir__() -> list[str]:
    return __all__
