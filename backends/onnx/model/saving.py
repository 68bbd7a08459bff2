"""Save models, also those that are too large for protobuf."""

import os
from pathlib import Path

import onnx
from onnx.external_data_helper import set_external_data

from ...files import make_parent, naming, temporary_folder, write_atomic
from .graph import copied

MIN_BYTES = 1024  # of a weight that is stored beside the graph
MAX_BYTES = 2_000_000_000  # of a single file, just below the limit of protobuf


def write_model(model: onnx.ModelProto, path: Path) -> Path:
    """Write a model and, to a file beside it, its large weights, which are removed from `model`."""
    for tensor in model.graph.initializer:  # onnx's option for this fails if the working directory has such a file
        if len(tensor.raw_data) >= MIN_BYTES:
            set_external_data(tensor, f"{path.name}.data")
    with naming(path):
        onnx.save_model(model, str(path))
    return path


def save_model(model: onnx.ModelProto, path: str | Path, *, max_bytes: int = MAX_BYTES) -> None:
    """Write a model atomically; if it is larger than `max_bytes`, put its weights into ``<name>.data``.

    The old model is removed before the new weights are written, and the new model is written last: an old model never
    meets new weights.
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
    """Return the size of the weights; protobuf's own count fails for models that are too large."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)
