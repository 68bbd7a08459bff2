"""Export a quantized function as StableHLO, which runs without Python."""

from typing import Any

import jax
from jax import export as jax_export

from klquant.errors import InvalidInputError, ModelError

from .quantized_function import QuantizedFunction


def export(quantized: QuantizedFunction, params: Any, *inputs: Any) -> jax_export.Exported:
    """Export a quantized function of its inputs, with the parameters inside.

    Parameters
    ----------
    quantized : QuantizedFunction
        From :func:`quantize` or :func:`requantize`.
    params : pytree
        The parameters that were quantized.
    *inputs : arrays or jax.ShapeDtypeStruct
        Of the shapes to export for; dimensions from ``jax.export.symbolic_shape`` stay free.

    Returns
    -------
    jax.export.Exported
        A function of the inputs: ``exported.call(*inputs)``. ``exported.serialize()`` are the bytes to keep, which
        ``jax.export.deserialize`` reads; both need the package flatbuffers. ``exported.mlir_module()`` is the text of
        the StableHLO.

    Raises
    ------
    InvalidInputError
        For anything but a QuantizedFunction.
    ModelError
        If JAX cannot export the function.
    """
    if not isinstance(quantized, QuantizedFunction):
        raise InvalidInputError(f"expected the result of quantize, got {type(quantized).__name__}")
    try:
        return jax_export.export(jax.jit(lambda *given: quantized.function(params, *given)))(*inputs)
    except Exception as error:
        raise ModelError(f"JAX cannot export the function, with {type(error).__name__}: {error}") from error
