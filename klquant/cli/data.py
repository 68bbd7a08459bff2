"""Calibration data from `--data`: batches that are read one at a time, and again in each pass."""

import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeAlias, overload

import numpy as np

from klquant.backends.npz import check_npy, read_npz
from klquant.errors import InvalidInputError

from .images import SUFFIXES as IMAGES
from .images import ImageOptions, load_image

Array: TypeAlias = "np.ndarray[Any, Any]"
ARRAYS = (".npy", ".npz")
SOURCE = "FOLDER|FILE|MODULE:FUNCTION"
FOLDERS = "folders"
_FUNCTION = re.compile(r"\w+(\.\w+)*:\w+")  # C:\images is a path
_EXPECTED = "`--data` must be a folder, an .npy or .npz file or module:function"


class Batches(Sequence[Any]):
    """Batches that are loaded on access and not kept."""

    def __init__(self, parts: Sequence[Any], load: Callable[[Any], Any]) -> None:
        self._parts, self._load = parts, load

    def __len__(self) -> int:
        return len(self._parts)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> "Batches": ...
    def __getitem__(self, index: int | slice) -> Any:
        part = self._parts[index]
        return Batches(part, self._load) if isinstance(index, slice) else self._load(part)


class FunctionBatches(Iterable[Any]):
    """Batches from a function of the user, which is called once per pass."""

    def __init__(self, name: str, function: Callable[[], Iterable[Any]]) -> None:
        self._name, self._function = name, function

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._function()
        except Exception as error:
            raise InvalidInputError(f"`{self._name}` failed: {_last_line(error)}") from error


def open_batches(
    source: str, *, batch_size: int | None = None, default_size: int = 32, images: ImageOptions | None = None
) -> Iterable[Any]:
    """Return the batches that `source` names, to iterate over several times.

    Parameters
    ----------
    source : str
        A folder of .npy or .npz files, or of images; an .npy or .npz file; or ``module:function``.
    batch_size : int, optional
        Samples per batch. In a folder of arrays each file is one sample if it is given, and one batch if not.
    default_size : int
        Samples per batch of a file and of images, without `batch_size`.
    images : ImageOptions, optional
        How to turn images into arrays; required for images.

    Returns
    -------
    iterable
        Arrays, or dicts of arrays by input name.

    Raises
    ------
    InvalidInputError
        For a source that is missing, empty or of another kind, and for a bad file of a folder when it is read. It
        names the source or the file.
    """
    path = Path(source)
    if path.is_dir():
        return _of_folder(path, batch_size, default_size, images)
    if path.is_file():
        return _of_file(path, batch_size or default_size)
    if not _FUNCTION.fullmatch(source):
        raise InvalidInputError(f"{_EXPECTED}, got {source!r}, which does not exist")
    if batch_size:
        raise InvalidInputError(f"`--batch-size` must be left out with a function: `{source}` makes its own batches")
    return FunctionBatches(source, import_function(source, "--data"))


def open_labels(labels: str, source: str) -> Array:
    """Return the class of each sample: from the folders of images, or from an .npy or .npz file.

    Raises
    ------
    InvalidInputError
        For another source, images outside of folders, and a file without one array of labels; naming it.
    """
    if labels == FOLDERS:
        return _labels_of_folders(Path(source))
    path = Path(labels)
    if not path.is_file() or path.suffix not in ARRAYS:
        raise InvalidInputError(f"`--labels` must be `{FOLDERS}` or an .npy or .npz file, got {labels!r}")
    content = load_arrays(path)
    if isinstance(content, dict):
        content = content["labels"] if "labels" in content else next(iter(content.values()))
    return np.asarray(content)


def _labels_of_folders(folder: Path) -> Array:
    """Return the number of each image's folder among the sorted folders."""
    images = _files(folder, IMAGES) if folder.is_dir() else []
    if not images or any(path.parent == folder for path in images):
        raise InvalidInputError(f"`--labels {FOLDERS}` needs images in one folder for each class in `{folder}`")
    classes = [path.relative_to(folder).parts[0] for path in images]
    numbers = {name: k for k, name in enumerate(sorted(set(classes)))}
    return np.array([numbers[name] for name in classes])


def some_batches(source: str | None, graph: Any, images: ImageOptions) -> Iterable[Any] | None:
    """Return the batches that `source` names; None without a source. `graph` is that of the model."""
    if source is None:
        return None
    return open_batches(source, default_size=fixed_batch_size(graph) or 8, images=images)


def first_batch(source: str | None, graph: Any, images: ImageOptions) -> list[Any] | None:
    """Return the first batch that `source` names, in a list; None without a source. `graph` is that of the model."""
    batches = some_batches(source, graph, images)
    return None if batches is None else list(islice(batches, 1))


def fixed_batch_size(graph: Any) -> int:
    """Return the first dimension of the first input of an onnx.GraphProto, or 0 if it is not fixed."""
    lengths = graph.input[0].type.tensor_type.shape.dim if graph.input else []
    return lengths[0].dim_value if lengths else 0


def load_arrays(path: Path, *, mapped: bool = False) -> Any:
    """Return the array of an .npy file, or the arrays of an .npz file by name.

    An .npz file with one array that was saved without a name gives that array. With `mapped`, the array of an .npy
    file stays on disk. Nothing is unpickled, and an .npz file must not unpack to more than 1 GiB or 20 times its size.
    """
    with path.open("rb") as file:
        try:
            if file.read(2) == b"PK":
                arrays = read_npz(file)
            else:
                check_npy(file, _size_from_start(file))
                file.seek(0)
                is_mapped = mapped and path.suffix == ".npy"
                return np.lib.format.open_memmap(path, mode="r") if is_mapped else np.load(file, allow_pickle=False)
        except OSError:
            raise
        except Exception as error:  # zipfile, zlib and NumPy raise many types
            raise InvalidInputError(
                f"`{path}` must be a NumPy file of numbers, got a damaged file or Python objects: {error}"
            ) from error
    if not arrays:
        raise InvalidInputError(f"`{path}` must hold at least one array, got none")
    return arrays["arr_0"] if list(arrays) == ["arr_0"] else arrays


def _size_from_start(file: IO[bytes]) -> int:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return size


def _of_folder(folder: Path, batch_size: int | None, default_size: int, images: ImageOptions | None) -> Batches:
    found = {kind: _files(folder, kind) for kind in (ARRAYS, IMAGES)}
    arrays, pictures = found[ARRAYS], found[IMAGES]
    if bool(arrays) == bool(pictures):
        counts = f"{len(arrays)} array files and {len(pictures)} images"
        raise InvalidInputError(f"`{folder}` must contain either {' and '.join(ARRAYS)} files or images, got {counts}")
    if arrays and batch_size is None:
        return Batches(arrays, load_arrays)
    if arrays:
        return Batches(_groups(arrays, batch_size or default_size), _stack_files)
    if images is None or images.size is None:
        raise InvalidInputError(f"`--image-size` must be given: `{folder}` contains {len(pictures)} images")
    groups = _groups(pictures, batch_size or default_size)
    return Batches(groups, lambda paths: np.stack([load_image(path, images) for path in paths]))


def _of_file(path: Path, size: int) -> Batches:
    """Split arrays along their first axis. An .npy file stays on disk; an .npz file is read once."""
    if path.suffix not in ARRAYS:
        raise InvalidInputError(f"{_EXPECTED}, got `{path}`")
    content = load_arrays(path, mapped=True)
    arrays = content if isinstance(content, dict) else {"array": content}
    lengths = {name: array.shape[0] if array.ndim and array.size else None for name, array in arrays.items()}
    if len(set(lengths.values())) != 1 or not all(lengths.values()):
        raise InvalidInputError(f"arrays of `{path}` must have the same length along the first axis, got {lengths}")
    begins = range(0, next(iter(arrays.values())).shape[0], size)
    if not isinstance(content, dict):
        return Batches(begins, lambda begin: np.array(content[begin : begin + size]))
    return Batches(begins, lambda begin: {name: array[begin : begin + size] for name, array in arrays.items()})


def _files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())


def _groups(paths: Sequence[Path], size: int) -> list[Sequence[Path]]:
    return [paths[begin : begin + size] for begin in range(0, len(paths), size)]


def _stack_files(paths: Sequence[Path]) -> Any:
    samples = [load_arrays(path) for path in paths]
    try:
        if isinstance(samples[0], Mapping):
            return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
        return np.stack(samples)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise InvalidInputError(
            f"samples must have the same names and shapes, got different ones in `{paths[0]}` to `{paths[-1]}`: {error}"
        ) from error


def import_function(source: str, option: str) -> Callable[..., Any]:
    """Import a function from the current folder, as `python -m` does."""
    if not _FUNCTION.fullmatch(source):
        raise InvalidInputError(f"`{option}` must be module:function, got {source!r}")
    module_name, _, name = source.rpartition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise InvalidInputError(
            f"`{option} {source}`: `{module_name}` cannot be imported: {_last_line(error)}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InvalidInputError(
            f"`{option} {source}`: `{name}` must be a function of `{module_name}`, got {function!r}"
        )
    return function  # type: ignore[no-any-return]


def _last_line(error: Exception) -> str:
    """Return the error and its line in the code of the user."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_machinery(frame.filename)]
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def _is_machinery(filename: str) -> bool:
    return filename in (__file__, importlib.__file__) or filename.startswith("<frozen")
