"""Kinds of files, told by how they begin: one of the wrong kind is refused before anything is loaded."""

import os
import zipfile
from pathlib import Path
from typing import Any

import click

MODEL, CALIBRATION, ARRAYS = "an ONNX model", "a calibration of klquant", "a NumPy file"
CACHE, PYTORCH = "a TensorRT calibration cache", "a file of PyTorch"


class InputFile(click.Path):
    """An existing file of one of these kinds, or of a kind that is not told by its beginning."""

    def __init__(self, *kinds: str) -> None:
        super().__init__(exists=True, dir_okay=False, path_type=Path)
        self._kinds = kinds

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return its path."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        found = kind_of(path)
        if found and found not in self._kinds:
            self.fail(f"expected {' or '.join(self._kinds)}, got `{path}`: {found}", param, ctx)
        return path


def kind_of(path: Path) -> str:
    """Return what a file plainly is, or nothing."""
    names = _names_in_zip(path)
    if names:
        return PYTORCH if "data.pkl" in names else CALIBRATION if "meta.npy" in names else ARRAYS
    with path.open("rb") as file:
        start = file.read(8)
    if start.startswith(b"\x93NUMPY"):
        return ARRAYS
    if start.startswith(b"TRT-"):
        return CACHE
    return MODEL if path.suffix == ".onnx" else ""


def _names_in_zip(path: Path) -> set[str]:
    try:
        with zipfile.ZipFile(path) as content:
            return {Path(name).name for name in content.namelist()}
    except zipfile.BadZipFile:
        return set()
