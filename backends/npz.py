"""Files that are either written whole or not at all, and read without running anything that is in them.

What is read may come from anyone. Nothing of an npz file is unpickled or written to disk, and its sizes are looked at
before anything is unpacked: memory is bounded by them, not by what the compressed bytes turn into.
"""

import io
import json
import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np

from klquant.errors import InvalidInputError

from .files import MAX_TEXT, write_atomic

Arrays: TypeAlias = Mapping[str, "np.ndarray[Any, Any]"]
MAX_BYTES = 2**30
"""Of the arrays in one npz file; one that is hardly compressed may hold more."""
MAX_RATIO = 20
"""Of arrays to the file that they are in, beyond `MAX_BYTES`."""
_META = "meta"


def save_npz(path: Path, kind: str, schema: int, meta: Mapping[str, Any], arrays: Arrays) -> None:
    """Write arrays, and what JSON can hold, as one npz file that says what it is."""
    text = json.dumps({"klquant": kind, "schema": schema, **meta, "arrays": list(arrays)}, allow_nan=False)
    buffer = io.BytesIO()
    content: dict[str, Any] = {_META: np.frombuffer(text.encode(), np.uint8), **arrays}
    try:
        np.savez_compressed(buffer, **content)
    except ValueError as error:  # zipfile's, about what it could not close after an interrupt
        raise (error.__context__ or error) from None
    write_atomic(path, buffer.getvalue())


def load_npz(path: Path, kind: str, schema: int) -> tuple[dict[str, Any], dict[str, "np.ndarray[Any, Any]"]]:
    """Return what JSON held and the arrays of a file of this kind; nothing in it is unpickled.

    Raises
    ------
    InvalidInputError
        For a damaged file, another kind, a newer schema, or more than `MAX_BYTES`; naming the file. A missing one is a
        FileNotFoundError.
    """
    with path.open("rb") as file:
        try:
            arrays = read_npz(file)
            meta = _parse_meta(arrays.pop(_META))
            found = meta.get("klquant"), meta.get("schema")
            if arrays.keys() != set(meta.get("arrays", arrays)):  # a damaged archive may seem to hold less
                raise ValueError(f"it holds the arrays {', '.join(arrays)}")
        except OSError:
            raise
        except Exception as error:  # zipfile, zlib, NumPy and json raise a dozen kinds
            raise InvalidInputError(
                f"`{path}` must be a klquant {kind} file, got a damaged or foreign one: {error}"
            ) from error
    if found != (kind, schema):
        raise InvalidInputError(f"`{path}` must be a klquant {kind} file of schema {schema}, got {found}")
    return meta, arrays


def read_npz(file: IO[bytes]) -> "dict[str, np.ndarray[Any, Any]]":
    """Return the arrays of numbers in an npz file by name; a ValueError, or what zipfile and NumPy raise, else."""
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        _check_members(archive.infolist(), len(members), size)
        return {name: _read_member(archive, info) for name, info in members.items()}


def check_npy(stream: IO[bytes], size: int) -> None:
    """Refuse a stream of so many bytes that is not one array of numbers, or is shorter than it says."""
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("arrays of numbers are written in version 1.0 of the npy format")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.kind not in "biuf":
        raise ValueError(f"an array must hold numbers, got {dtype}")
    expected = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or expected > size - stream.tell():
        raise ValueError(f"an array of shape {shape} needs {expected} bytes, got {size - stream.tell()}")


def _check_members(members: list[zipfile.ZipInfo], num_names: int, size: int) -> None:
    """Refuse what unpacks to too much: bz2 and lzma do so in one step, a name that stands twice more than once."""
    if num_names < len(members):
        raise ValueError("every array must have a name of its own")
    total, limit = sum(info.file_size for info in members), max(MAX_BYTES, MAX_RATIO * size)
    if total > limit:
        raise ValueError(f"arrays of {limit} bytes are read at most, got {total} in a file of {size}")
    for info in members:
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or not 0 <= info.header_offset <= size:
            raise ValueError(f"{info.filename!r} must be stored or deflated in this file")


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> "np.ndarray[Any, Any]":
    with archive.open(info) as stream:
        check_npy(stream, info.file_size)
    with archive.open(info) as stream:
        array: np.ndarray[Any, Any] = np.lib.format.read_array(stream, allow_pickle=False)
    return array


def _parse_meta(content: "np.ndarray[Any, Any]") -> dict[str, Any]:
    """Return a JSON object, in which numbers are finite."""
    if content.nbytes > MAX_TEXT:
        raise ValueError(f"JSON of {MAX_TEXT} bytes is read at most, got {content.nbytes}")
    meta: dict[str, Any] = json.loads(content.tobytes(), parse_constant=_refuse)
    return meta


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
