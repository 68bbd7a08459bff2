"""Outputs without the positions that only fill up a batch: what a model computes there has no meaning."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .classes import Array
from .outputs import Outputs

MASK = "attention_mask"
"""End of the name of an input of shape (samples, positions) that is 0 where a sample is filled up."""


def unpadded(feed: Any, outputs: Outputs) -> Outputs:
    """Return outputs without the positions that the attention mask of a batch leaves out.

    Parameters
    ----------
    feed : mapping
        The inputs by name: NumPy arrays, JAX arrays or tensors of torch. Without one whose name ends in
        "attention_mask", the outputs stay as they are.
    outputs : mapping

    Returns
    -------
    mapping
        Arrays of shape (samples, positions, ..., channels) become (1, positions that count, ..., channels).
    """
    mask = _mask(feed)
    if mask is None:
        return outputs
    return {
        name: array[mask][None] if array.ndim > 2 and array.shape[:2] == mask.shape else array
        for name, array in outputs.items()
    }


def _mask(feed: Any) -> Array | None:
    """Return where the positions count; None if all do, or there is no mask of this form."""
    given = (one for name, one in feed.items() if name.endswith(MASK)) if isinstance(feed, Mapping) else ()
    arrays = (np.asarray(one.cpu() if hasattr(one, "cpu") else one) for one in given if hasattr(one, "ndim"))
    mask = next((one for one in arrays if one.ndim == 2), None)
    if mask is None or not np.isin(mask, (0, 1)).all() or not mask.any() or mask.all():
        return None
    counts: Array = mask != 0
    return counts
