"""Files that are either written whole or not at all, and read without running anything that is in them."""

import glob
import io
import json
import os
import secrets
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import numpy as np

from klquant.errors import InvalidInputError

Arrays: TypeAlias = Mapping[str, "np.ndarray[Any, Any]"]
_META = "meta"


def write_atomic(path: Path, content: bytes) -> None:
    """Write beside `path` and rename: a reader never sees half a file, also after a crash or on a full disk."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}.tmp")
    with naming(path):
        try:
            make_parent(path)
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


def make_parent(path: Path) -> None:
    """Make the folder of a file; where a file stands in its place, opening says so better than this."""
    with suppress(FileExistsError):
        path.parent.mkdir(parents=True)


def remove_leftovers(path: Path) -> None:
    """Remove what a process that was killed while it wrote this file left beside it."""
    for left in path.parent.glob(f".{glob.escape(path.name)}-????????.tmp"):
        left.unlink(missing_ok=True)


@contextmanager
def temporary_folder(place: Path | None = None, prefix: str = "klquant-") -> Iterator[Path]:
    """Yield a folder that goes again, also if its removal is interrupted."""
    with TemporaryDirectory(dir=place, prefix=prefix, ignore_cleanup_errors=True) as folder:
        try:
            yield Path(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let the errors of the file system name the file that was meant, and not one beside it or none."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def save_npz(path: Path, kind: str, schema: int, meta: Mapping[str, Any], arrays: Arrays) -> None:
    """Write arrays, and what JSON can hold, as one npz file that says what it is."""
    text = json.dumps({"klquant": kind, "schema": schema, **meta, "arrays": list(arrays)}, allow_nan=False)
    buffer = io.BytesIO()
    content: dict[str, Any] = {_META: np.frombuffer(text.encode(), np.uint8), **arrays}
    np.savez_compressed(buffer, **content)
    write_atomic(path, buffer.getvalue())


def load_npz(path: Path, kind: str, schema: int) -> tuple[dict[str, Any], dict[str, "np.ndarray[Any, Any]"]]:
    """Return what JSON held and the arrays of a file of this kind; nothing in it is unpickled.

    Raises
    ------
    InvalidInputError
        For a damaged file, another kind, or a newer schema; naming the file. A missing one is a FileNotFoundError.
    """
    content = io.BytesIO(path.read_bytes())
    try:
        if not zipfile.is_zipfile(content):  # of which NumPy says that it might be a pickle
            raise ValueError("it is no npz archive")
        content.seek(0)
        with np.load(content, allow_pickle=False) as archive:
            arrays = dict(archive)
        meta = json.loads(arrays.pop(_META).tobytes())
        found = meta.get("klquant"), meta.get("schema")
        if arrays.keys() != set(meta.get("arrays", arrays)):  # a damaged archive may seem to hold less
            raise ValueError(f"it holds the arrays {', '.join(arrays)}")
    except Exception as error:  # zip, each of its compressors, NumPy and JSON have their own
        raise InvalidInputError(
            f"`{path}` must be a klquant {kind} file, got a damaged or foreign one: {error}"
        ) from error
    if found != (kind, schema):
        raise InvalidInputError(f"`{path}` must be a klquant {kind} file of schema {schema}, got {found}")
    return meta, arrays
