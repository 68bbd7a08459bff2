"""Files that are either written whole or not at all, and read without running anything that is in them.

What is read may come from anyone. Nothing of an npz file is unpickled or written to disk, and its sizes are looked at
before anything is unpacked: memory is bounded by them, not by what the compressed bytes turn into.
"""

import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from klquant.errors import InvalidInputError

MAX_TEXT = 2**24
"""Bytes of a text or JSON; its objects take some 30 times as much."""


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


def read_limited(path: Path) -> bytes:
    """Return the bytes of a file of text, of `MAX_TEXT` at most."""
    with path.open("rb") as file:
        content = file.read(MAX_TEXT + 1)
    if len(content) > MAX_TEXT:
        raise InvalidInputError(f"`{path}` must have {MAX_TEXT >> 20} MiB of text at most, got more")
    return content
