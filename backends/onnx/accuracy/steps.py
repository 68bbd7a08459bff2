"""The steps that `auto` and `tune` try on an ONNX model, by name."""

from collections.abc import Callable, Iterable
from typing import Any

import onnx

from ...accuracy.trials import Recipe
from ..model.preparation import Prepared
from ..scaling.equalization import equalize
from ..scaling.smooth_quant import smooth

CHANGES: dict[str, Callable[[Prepared, Iterable[Any]], onnx.ModelProto]] = {
    "equalize": lambda prepared, batches: equalize(prepared),
    "smooth": smooth,
}
"""Those that change the float model before it is calibrated."""
CORRECT_BIAS, REFINE = "correct_bias", "refine"


def changes_of(recipe: Recipe) -> tuple[str, ...]:
    """Return the steps of a recipe that change the float model."""
    return tuple(step for step in recipe.steps if step in CHANGES)


def options_of(recipe: Recipe, batches: Iterable[Any], min_int8: float) -> dict[str, Any]:
    """Return what the other steps of a recipe are as arguments of :func:`quantize`.

    To refine is what `quantize` does by itself if it gets data: ranges and layers in floating point are chosen by the
    outputs, and biases corrected where that helps.
    """
    if REFINE in recipe.steps:
        return {"batches": batches, "min_int8": min_int8}
    if CORRECT_BIAS in recipe.steps:
        return {"batches": batches, "min_int8": 1.0, "correct_bias": True}
    return {}
