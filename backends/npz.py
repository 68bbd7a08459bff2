"""Reading and writing npz files. A file that is read may come from anyone.

Nothing is unpickled and nothing is unpacked to disk. The sizes that the file declares are checked before anything is
decompressed, and reading takes no more memory than they say.
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
"""Total size of the arrays in one npz file. A file that is hardly compressed may hold more."""
MAX_RATIO = 20
"""Largest ratio of the arrays to their file, beyond `MAX_BYTES`."""
_META = "meta"


def save_npz(path: Path, kind: str, schema: int, meta: Mapping[str, Any], arrays: Arrays) -> None:
    """Write arrays and JSON metadata as one npz file that names its kind and schema."""
    text = json.dumps({"klquant": kind, "schema": schema, **meta, "arrays": list(arrays)}, allow_nan=False)
    buffer = io.BytesIO()
    content: dict[str, Any] = {_META: np.frombuffer(text.encode(), np.uint8), **arrays}
    try:
        np.savez_compressed(buffer, **content)
    except ValueError as error:  # zipfile cannot close the file after MemoryError or Ctrl-C, and hides them
        raise (error.__context__ or error) from None
    write_atomic(path, buffer.getvalue())


def load_npz(path: Path, kind: str, schema: int) -> tuple[dict[str, Any], dict[str, "np.ndarray[Any, Any]"]]:
    """Return the metadata and the arrays of a file of this kind.

    Raises
    ------
    InvalidInputError
        For a damaged file, another kind or schema, or one that unpacks to too much. It names the file.
    OSError
        If the file cannot be read.
    """
    with path.open("rb") as file:
        try:
            arrays = read_npz(file)
            meta = _parse_meta(arrays.pop(_META))
            found = meta.get("klquant"), meta.get("schema")
            if arrays.keys() != set(meta.get("arrays", arrays)):  # a damaged archive may lose some
                raise ValueError(f"expected the arrays {meta['arrays']}, got {list(arrays)}")
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
    """Return the arrays of an npz file by name; raise ValueError, or an error of zipfile or NumPy, for a bad file."""
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        _check_members(archive.infolist(), len(members), size)
        return {name: _read_member(archive, info) for name, info in members.items()}


def check_npy(stream: IO[bytes], size: int) -> None:
    """Raise ValueError if a stream of `size` bytes is not an array of numbers, or is shorter than its shape needs."""
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError("arrays must be in version 1.0 of the npy format, got {}.{}".format(*version))
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.kind not in "biuf":
        raise ValueError(f"an array must hold numbers, got {dtype}")
    expected = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or expected > size - stream.tell():
        raise ValueError(f"an array of shape {shape} needs {expected} bytes, got {size - stream.tell()}")


def _check_members(members: list[zipfile.ZipInfo], num_names: int, size: int) -> None:
    """Raise ValueError for what could take too much memory. bz2 and lzma decompress without a limit per step."""
    if num_names < len(members):
        raise ValueError("array names must be unique")
    total, limit = sum(info.file_size for info in members), max(MAX_BYTES, MAX_RATIO * size)
    if total > limit:
        raise ValueError(f"arrays must have at most {limit} bytes in total, got {total} in a file of {size}")
    for info in members:
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.header_offset < 0:
            raise ValueError(f"{info.filename!r} must be stored or deflated in this file")


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> "np.ndarray[Any, Any]":
    with archive.open(info) as stream:
        check_npy(stream, info.file_size)
    with archive.open(info) as stream:
        array: np.ndarray[Any, Any] = np.lib.format.read_array(stream, allow_pickle=False)
    return array


def _parse_meta(content: "np.ndarray[Any, Any]") -> dict[str, Any]:
    """Return the JSON object that holds the metadata. Its numbers are finite."""
    if content.nbytes > MAX_TEXT:
        raise ValueError(f"JSON must have at most {MAX_TEXT} bytes, got {content.nbytes}")
    meta: dict[str, Any] = json.loads(content.tobytes(), parse_constant=_refuse)
    return meta


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not valid JSON")
