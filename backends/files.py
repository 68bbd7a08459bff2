"""Writing files whole or not at all, and reading text of limited size."""

import glob
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from klquant.errors import InvalidInputError

MAX_TEXT = 2**24
"""Bytes of a text or JSON file. Parsed objects take about 30 times as much."""


def write_atomic(path: Path, content: bytes) -> None:
    """Write to a temporary file beside `path`, then rename it: no reader sees half a file, even after a crash."""
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
    """Make the folder of a file. If a file is in its place, opening the path gives the better error."""
    with suppress(FileExistsError):
        path.parent.mkdir(parents=True)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote this file."""
    for left in path.parent.glob(f".{glob.escape(path.name)}-????????.tmp"):
        left.unlink(missing_ok=True)


@contextmanager
def temporary_folder(place: Path | None = None, prefix: str = "klquant-") -> Iterator[Path]:
    """Yield a folder that is removed afterwards."""
    with TemporaryDirectory(dir=place, prefix=prefix, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let errors of the file system name this file, rather than a temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def is_unicode(value: object) -> bool:
    """Return whether this is text that UTF-8 can hold; JSON allows lone surrogates, which it cannot."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def read_limited(path: Path) -> bytes:
    """Return the bytes of a text file of at most `MAX_TEXT` bytes."""
    with path.open("rb") as file:
        content = file.read(MAX_TEXT + 1)
    if len(content) > MAX_TEXT:
        raise InvalidInputError(f"`{path}` must have at most {MAX_TEXT >> 20} MiB of text, got more")
    return content
