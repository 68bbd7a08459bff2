"""Compare the results of a function with those of its quantized form."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import numpy as np

from klquant.errors import InvalidInputError

from ...accuracy.classes import Array
from ...accuracy.comparison import Comparison, Metric, compare_models
from ...accuracy.outputs import Outputs
from ...batches import numbered, tracked
from ..model.arguments import Function, as_numpy, inputs_of, jitted
from ..quantized_function import QuantizedFunction


def named_outputs(function: Callable[..., Any], params: Any, batch: Any) -> Outputs:
    """Return the arrays that a function returns, by their path, as NumPy arrays."""
    found = jax.tree_util.tree_flatten_with_path(function(params, *inputs_of(batch)))[0]
    return {jax.tree_util.keystr(path) or "output": _array(leaf) for path, leaf in found}


def _array(leaf: Any) -> Array:
    array = as_numpy(leaf)
    narrow = jax.numpy.issubdtype(array.dtype, jax.numpy.floating) and array.dtype.itemsize < 4
    return array.astype(np.float32) if narrow else array


def num_bytes(params: Any) -> int:
    """Return the size of the arrays of the parameters."""
    return int(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params) if hasattr(leaf, "dtype")))


def compare(
    f: Function,
    quantized: QuantizedFunction,
    params: Any,
    batches: Iterable[Any],
    *,
    labels: Array | None = None,
    metric: Metric | None = None,
    progress: bool = True,
) -> Comparison:
    """Run a function and its quantized form on the same data and compare outputs, time and size.

    Parameters
    ----------
    f : callable (params, *inputs)
        In floating point; it is jitted here.
    quantized : QuantizedFunction
        From :func:`quantize` or :func:`requantize`.
    params : pytree
    batches : iterable
        Data that calibration has not seen; iterated once.
    labels : array, shape (samples,), integers, optional
        The true class of each sample, in the order of the batches.
    metric : callable, optional
        From the outputs of both, each a list with one mapping of arrays by name for each batch, to a number. The names
        are ``output``, or the path in what `f` returns, such as ``['logits']``.
    progress : bool
        Show a bar on a terminal.

    Returns
    -------
    Comparison
        As of :func:`klquant.backends.onnx.compare`. The sizes are those of the parameters, with one byte for each
        quantized weight in place of its own size.

    Raises
    ------
    InvalidInputError
        For outputs of other shapes, labels that do not fit, no batches, anything but a QuantizedFunction.
    """
    if not isinstance(quantized, QuantizedFunction):
        raise InvalidInputError(f"expected the result of quantize, got {type(quantized).__name__}")
    runs = tuple(partial(named_outputs, function, params) for function in (jitted(f), quantized.function))
    shown = (batch for _, batch in numbered(tracked(batches, "comparing" if progress else "")))
    size = num_bytes(params)
    sizes = size, size - quantized.bytes_saved
    return compare_models((runs[0], runs[1]), shown, timed=runs, sizes=sizes, labels=labels, metric=metric)
