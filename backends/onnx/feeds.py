"""Batches of any form, as the arrays by input name that onnxruntime takes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import onnx

from klquant.errors import InvalidInputError

from .model.graph import Graph

Array: TypeAlias = "np.ndarray[Any, Any]"


class Input(NamedTuple):
    """What a model wants to be given."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str, ...] | None
    """Sizes, or names of sizes that are free; None if not even the rank is known."""


def read_inputs(model: onnx.ModelProto, graph: Graph) -> list[Input]:
    """Return the inputs of a model in their order."""
    values = {value.name: value for value in model.graph.input}
    return [_read_input(values[name]) for name in graph.inputs]


def _read_input(value: onnx.ValueInfoProto) -> Input:
    tensor = value.type.tensor_type
    if value.type.WhichOneof("value") != "tensor_type":
        raise InvalidInputError(f"input `{value.name}` must be a tensor, got {value.type.WhichOneof('value')}")
    sizes = [size.dim_value if size.dim_value > 0 else size.dim_param or "?" for size in tensor.shape.dim]  # -1 is free
    shape = tuple(sizes) if tensor.HasField("shape") else None
    return Input(value.name, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type), shape)


def make_feed(batch: Any, inputs: Sequence[Input]) -> dict[str, Array]:
    """Return a batch by input name: from a mapping, from a tuple or list in the order of the inputs, or from an array.

    Raises InvalidInputError, naming the input, for one too many or missing, another dtype (floats are converted), and
    a size that the model does not take.
    """
    names = [wanted.name for wanted in inputs]
    if not isinstance(batch, Mapping):
        items = batch if isinstance(batch, tuple | list) else [batch]
        if len(items) != len(names):
            raise InvalidInputError(f"expected {len(names)} arrays, for inputs {_list(names)}, got {len(items)}")
        batch = dict(zip(names, items, strict=True))
    if missing := [name for name in names if name not in batch]:
        raise InvalidInputError(f"expected all of the inputs {_list(names)}, got none for {_list(missing)}")
    if unknown := [name for name in batch if name not in names]:
        raise InvalidInputError(f"expected only the inputs {_list(names)}, got {_list(unknown)} too")
    return {wanted.name: _convert(batch[wanted.name], wanted) for wanted in inputs}


def _list(names: Sequence[Any]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _convert(value: Any, wanted: Input) -> Array:
    try:
        array = np.asarray(value)
    except Exception as error:  # of any library that the value comes from
        raise InvalidInputError(
            f"input `{wanted.name}` must be an array, got {type(value).__name__}: {error}"
        ) from error
    if array.dtype != wanted.dtype:
        if not (array.dtype.kind == wanted.dtype.kind == "f"):
            raise InvalidInputError(f"input `{wanted.name}` must be {wanted.dtype}, got {array.dtype}")
        with np.errstate(over="ignore"):  # infinity is found where it is observed
            array = array.astype(wanted.dtype)
    if not _fits(array.shape, wanted.shape):
        shape = "(" + ", ".join(map(str, wanted.shape or ())) + ")"
        raise InvalidInputError(f"input `{wanted.name}` must have shape {shape}, got {array.shape}")
    return array


def _fits(shape: tuple[int, ...], wanted: tuple[int | str, ...] | None) -> bool:
    if wanted is None:
        return True
    return len(shape) == len(wanted) and all(
        isinstance(size, str) or size == given for given, size in zip(shape, wanted, strict=True)
    )


def few_samples(feeds: Iterable[dict[str, Array]], inputs: Sequence[Input], limit: int) -> list[dict[str, Array]]:
    """Return the first samples: parts of batches where all inputs have a free first axis of one length."""
    found: list[dict[str, Array]] = []
    number = 0
    for feed in islice(feeds, limit):
        lengths = {array.shape[0] if array.ndim else 0 for array in feed.values()}
        free = all(one.shape and isinstance(one.shape[0], str) for one in inputs) and len(lengths) == 1
        left = limit - number
        found.append({name: array[:left] for name, array in feed.items()} if free else feed)
        number += min(left, *lengths) if free else 1
        if number >= limit:
            break
    return found


class _Rewound:
    """A reader with ``rewind`` as data that can be iterated again."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader

    def __iter__(self) -> Iterator[Any]:
        self._reader.rewind()
        return iter(self._reader.get_next, None)


def from_reader(batches: Any, *, once: bool = False) -> Iterable[Any]:
    """Return the batches of onnxruntime's CalibrationDataReader; other data as they are.

    Parameters
    ----------
    batches : iterable, or object with ``get_next``
        A reader is rewound before each iteration. If it has no ``rewind``, its batches are collected in a list.
    once : bool
        They will be iterated only once, so no list is needed.

    Returns
    -------
    iterable

    Raises
    ------
    InvalidInputError
        For a reader without ``rewind`` that has no batches left.
    """
    if not callable(getattr(batches, "get_next", None)):
        found: Iterable[Any] = batches
        return found
    if callable(getattr(batches, "rewind", None)):
        return _Rewound(batches)
    stream = iter(batches.get_next, None)
    if once:
        return stream
    collected = list(stream)
    if not collected:
        raise InvalidInputError(
            f"the reader must have batches, got a {type(batches).__name__} whose get_next returns None and that has no "
            f"rewind; make a new one"
        )
    return collected
