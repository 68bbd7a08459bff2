"""The form of a model that is calibrated and quantized: checked, float, its constants and BatchNorms folded.

All goes through files in a temporary directory, with the weights beside the graph: protobuf holds 2 GB and no more.
"""

import os
from pathlib import Path

import onnx
from onnx.external_data_helper import set_external_data

from ...files import make_parent, naming, temporary_folder, write_atomic
from .graph import copied

MIN_BYTES = 1024  # of a weight, to lie beside the graph
MAX_BYTES = 2_000_000_000  # of one file, a little below what protobuf can hold


def write_model(model: onnx.ModelProto, path: Path) -> Path:
    """Write a model, with what is large in a file beside it; that is no longer in `model` then."""
    for tensor in model.graph.initializer:  # not by onnx's own option, which minds files of that name where we stand
        if len(tensor.raw_data) >= MIN_BYTES:
            set_external_data(tensor, f"{path.name}.data")
    with naming(path):
        onnx.save_model(model, str(path))
    return path


def save_model(model: onnx.ModelProto, path: str | Path, *, max_bytes: int = MAX_BYTES) -> None:
    """Write a model, whole or not at all; if it is larger than `max_bytes`, with its weights in ``<name>.data``.

    Of two files the model itself comes last, and an old one goes first: never stands an old model with new weights.
    """
    path = Path(path)
    if num_bytes(model) < max_bytes:
        write_atomic(path, model.SerializeToString())
        return
    with naming(path):
        make_parent(path)
        with temporary_folder(path.parent, f".{path.name}-") as folder:
            _replace_both(path, write_model(copied(model), folder / path.name))


def _replace_both(path: Path, written: Path) -> None:
    data = written.with_name(f"{path.name}.data")
    for file in (data, written):
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
    path.unlink(missing_ok=True)
    data.replace(path.with_name(data.name))
    written.replace(path)


def num_bytes(model: onnx.ModelProto) -> int:
    """Return how much the weights take; protobuf cannot tell it of more than it can hold."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)
