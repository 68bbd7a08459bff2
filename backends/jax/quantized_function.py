"""The result of quantizing a function."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..calibration import Calibration
from ..html_tables import html_skipped, html_thresholds
from ..ranges import Range
from ..thresholds import LayerThreshold
from .kernels import Form


class QuantizedFunction(NamedTuple):
    """A quantized function, from :func:`quantize`."""

    function: Callable[..., Any]
    """Has the signature of the original, and can be jitted, vmapped and exported.

    It raises InvalidInputError for shapes or flags with which the function has other products than were quantized.
    """
    form: Form
    """`int8`: products of integers; `simulate`: the same in floating point."""
    thresholds: dict[str, LayerThreshold]
    """Of the activations that enter quantized products, by name."""
    weight_scales: dict[str, "np.ndarray[Any, Any]"]
    """The scale of each output channel of the weights, by name."""
    skipped: dict[str, str]
    """Why products stay in floating point, by name."""
    calibration: Calibration
    """Everything that was found; ``calibration.save(path)`` saves it."""
    bytes_saved: int = 0
    """By how much the weights are smaller than in floating point."""
    ranges: Mapping[str, Range] = {}
    """Of the activations that have a zero point, by name."""
    corrections: Mapping[str, float] = {}
    """The largest absolute correction of each product, in units of its result; empty without bias correction."""

    def __repr__(self) -> str:
        """Return what it is in one line."""
        return (
            f"QuantizedFunction({self.form}: {len(self.thresholds)} activations quantized, {len(self.skipped)} skipped)"
        )

    def _repr_html_(self) -> str:
        """Return a table of the thresholds for notebooks."""
        caption = f"JAX function quantized ({self.form}): {len(self.thresholds)} activations"
        return html_thresholds(caption, "layer", self.thresholds) + html_skipped(self.skipped)
