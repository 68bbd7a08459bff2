"""Folders that become unwritable in several ways, and how to break and repair each."""

import contextlib
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .jobs import folder_for

MOUNT, UMOUNT = shutil.which("mount"), shutil.which("umount")


class Disk(NamedTuple):
    folder: Path
    spoil: Callable[[], None]
    mend: Callable[[], None]


@contextlib.contextmanager
def full(room):
    """Yield a small file system that is full except for some bytes. It needs the permission to mount."""
    with _mounted() as folder:

        def fill():
            with (folder / "filler").open("wb", buffering=0) as file:
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(4096))
                file.truncate(max(file.tell() - room, 0))

        yield Disk(folder, fill, (folder / "filler").unlink)


@contextlib.contextmanager
def limited(room):
    """Yield a folder in which no file may exceed a size."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with folder_for("limited") as folder:
        try:
            yield Disk(folder, lambda: _limit(room, limit[1]), lambda: _limit(*limit))
        finally:
            _limit(*limit)


def _limit(soft, hard):
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def read_only():
    """Yield a folder in which nothing can be created. For root it is a read-only mount, as modes do not stop root."""
    if can_mount():
        with _mounted() as folder:
            yield Disk(folder, lambda: _mount("-o", "remount,ro", folder), lambda: _mount("-o", "remount,rw", folder))
    else:
        with folder_for("read-only") as folder:
            yield Disk(folder, lambda: folder.chmod(0o555), lambda: folder.chmod(0o755))


@contextlib.contextmanager
def replaced():
    """Yield a folder that is replaced by a file."""
    with folder_for("replaced") as around:
        folder, aside = around / "folder", around / "aside"
        folder.mkdir()

        def spoil():
            folder.rename(aside)
            folder.write_bytes(b"")

        def mend():
            folder.unlink()
            aside.rename(folder)

        yield Disk(folder, spoil, mend)


def can_mount():
    """Return whether this process may mount a file system."""
    try:
        with _mounted():
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextlib.contextmanager
def _mounted():
    if MOUNT is None or os.geteuid() != 0:
        raise PermissionError("only root mounts file systems")
    with folder_for("mounted") as folder:
        _mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", folder)
        try:
            yield folder
        finally:
            subprocess.run([UMOUNT, folder], check=True, capture_output=True)


def _mount(*arguments):
    subprocess.run([MOUNT, *arguments], check=True, capture_output=True)


FULL = "full disk"
DISKS = {
    "a file may have no byte": lambda: limited(0),
    "a file may have 4 KiB": lambda: limited(4096),
    "a file in place of the folder": replaced,
    "read-only folder": read_only,
    FULL: lambda: full(0),
    "full disk, room for 4 KiB": lambda: full(4096),
}


def available():
    """Return the kinds of disks that are possible on this machine."""
    return [kind for kind in DISKS if can_mount() or FULL not in kind]
