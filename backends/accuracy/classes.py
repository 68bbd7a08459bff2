"""The classes that an output votes for, where it looks like scores."""

from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]
CLOSE = 1e-3  # by which a sum of probabilities, or the length of a vector, may differ from 1


def has_scores(values: Array) -> bool:
    """Return whether an output looks like the scores of classes.

    That is a matrix of shape (samples, classes) whose rows are not vectors of length 1, as embeddings are; any output
    whose last axis holds probabilities; and a column of probabilities.
    """
    if values.dtype.kind != "f" or values.ndim < 2 or not values.size or not np.isfinite(values).all():
        return False
    wide = values.astype(np.float64)
    if values.shape[-1] == 1:
        return values.ndim == 2 and bool((wide >= 0).all() and (wide <= 1).all())
    if (wide >= 0).all() and (np.abs(wide.sum(-1) - 1) < CLOSE).all():
        return True
    return values.ndim == 2 and not (np.abs(np.linalg.norm(wide, axis=-1) - 1) < CLOSE).all()


def top_classes(values: Array) -> Array:
    """Return the class with the best score; of a column of probabilities whether it is above one half."""
    if values.shape[-1] == 1:
        return (values[..., 0] > 0.5).astype(np.int64)
    classes: Array = values.argmax(-1)
    return classes
