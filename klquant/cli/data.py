"""Calibration data from `--data`: batches that are read one at a time, and again in each pass."""

import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias, overload

import click
import numpy as np

from klquant.backends.npz import check_npy, read_npz
from klquant.backends.warning import warn
from klquant.errors import InvalidInputError

from .images import SUFFIXES as IMAGES
from .images import ImageOptions, load_image
from .normalization import suspicions
from .options import Decorator

Array: TypeAlias = "np.ndarray[Any, Any]"
ARRAYS = (".npy", ".npz")
SOURCE = "FOLDER|FILE|MODULE:FUNCTION"
_FUNCTION = re.compile(r"\w+(\.\w+)*:\w+")  # C:\images is a path
_EXPECTED = "`--data` must be a folder, an .npy or .npz file or module:function"


def data_option(what: str = "Calibration data, as for `klquant calibrate`.") -> Decorator:
    """Return the required option ``--data``."""
    return click.option("--data", required=True, metavar=SOURCE, help=what, shell_complete=click.Path().shell_complete)


class Batches(Sequence[Any]):
    """Batches that are loaded on access and not kept."""

    def __init__(
        self, parts: Sequence[Any], load: Callable[[Any], Any], note: str = "", chosen: "Selection | None" = None
    ) -> None:
        self._parts, self._load = parts, load
        self.note = note
        """How many images there are and how they are read; empty for arrays."""
        self.chosen = chosen
        """The samples that they hold, where the source says how many it has."""

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


class FirstSamples(Iterable[Any]):
    """Batches up to a number of samples."""

    def __init__(self, batches: Iterable[Any], number: int) -> None:
        self._batches, self.number = batches, number

    def __iter__(self) -> Iterator[Any]:
        left = self.number
        for batch in self._batches:
            if left <= 0:
                return
            yield _first(batch, left)
            left -= len(next(iter(batch.values())) if isinstance(batch, Mapping) else _samples(batch))


class Selection(NamedTuple):
    """Which samples of a source are used."""

    samples: list[int]
    of: int
    """How many there are."""


class Amount(NamedTuple):
    """How much data to read, and in which pieces."""

    batch_size: int | None = None
    """Samples per batch. In a folder of arrays each file is one sample if it is given, and one batch if not."""
    default_size: int = 32
    """Samples per batch of a file and of images, without `batch_size`."""
    max_samples: int | None = None
    """Of more, evenly spaced ones are taken; of a function, and of files that are batches, the first."""
    min_batches: int = 1
    """The default size is lowered to get so many."""
    whole: bool = False
    """Leave out a last batch that is smaller."""

    def chosen(self, number: int) -> Selection:
        """Choose from this number of samples."""
        limit = min(self.max_samples or number, number)
        picked = [k * number // limit for k in range(limit)]
        size = self.size(number)
        return Selection(picked[: limit - limit % size] if self.whole and limit >= size else picked, number)

    def size(self, number: int) -> int:
        """Return the samples per batch."""
        limit = min(self.max_samples or number, number)
        return self.batch_size or max(1, min(self.default_size, limit // self.min_batches))


def open_samples(
    source: str, images: ImageOptions, model: Any, *, folder: Path | None = None, amount: Amount | None = None
) -> Iterable[Any]:
    """Return the batches that `source` names, with options that are missing taken from an onnx.ModelProto.

    Of images it prints on stderr how they are read. With the folder of the model, signs of another normalization are
    warned of.
    """
    options, amount = images.of_model(model.graph), amount or Amount()
    fixed = fixed_batch_size(model.graph)
    if fixed and not amount.batch_size:
        amount = amount._replace(default_size=fixed, min_batches=1, whole=True)
    batches = open_batches(source, amount, images=options)
    if isinstance(batches, Batches) and batches.note:
        click.echo(batches.note, err=True)
        for text in suspicions(folder, model, options) if folder else []:
            warn(text)
    return batches


def open_batches(source: str, amount: Amount | None = None, *, images: ImageOptions | None = None) -> Iterable[Any]:
    """Return the batches that `source` names, to iterate over several times.

    Parameters
    ----------
    source : str
        A folder of .npy or .npz files, or of images; an .npy or .npz file; or ``module:function``.
    amount : Amount, optional
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
    path, amount = Path(source), amount or Amount()
    if path.is_dir():
        return _of_folder(path, amount, images)
    if path.is_file():
        return _of_file(path, amount)
    if not _FUNCTION.fullmatch(source):
        raise InvalidInputError(f"{_EXPECTED}, got {source!r}, which does not exist")
    if amount.batch_size:
        raise InvalidInputError(f"`--batch-size` must be left out with a function: `{source}` makes its own batches")
    return _limited(FunctionBatches(source, import_function(source, "--data")), amount)


def some_batches(source: str | None, model: Any, images: ImageOptions) -> Iterable[Any] | None:
    """Return the batches that `source` names, for a model; None without a source."""
    return None if source is None else open_samples(source, images, model, amount=Amount(default_size=8))


def first_batch(source: str | None, model: Any, images: ImageOptions) -> list[Any] | None:
    """Return the first batch that `source` names, in a list, for a model; None without a source."""
    batches = some_batches(source, model, images)
    return None if batches is None else list(islice(batches, 1))


def fixed_batch_size(graph: Any) -> int:
    """Return the first dimension of the first input of an onnx.GraphProto, or 0 if it is not fixed."""
    lengths = graph.input[0].type.tensor_type.shape.dim if graph.input else []
    return max(lengths[0].dim_value, 0) if lengths else 0  # some exporters write -1


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


def _of_folder(folder: Path, amount: Amount, images: ImageOptions | None) -> Iterable[Any]:
    found = {kind: files_of(folder, kind) for kind in (ARRAYS, IMAGES)}
    arrays, pictures = found[ARRAYS], found[IMAGES]
    if bool(arrays) == bool(pictures):
        counts = f"{len(arrays)} array files and {len(pictures)} images"
        raise InvalidInputError(f"`{folder}` must contain either {' and '.join(ARRAYS)} files or images, got {counts}")
    if arrays and amount.batch_size is None:
        return _limited(Batches(arrays, load_arrays), amount)
    if arrays:
        return Batches(_groups(arrays, amount), _stack_files, chosen=amount.chosen(len(arrays)))
    if images is None or images.size is None:
        raise InvalidInputError(
            f"`--image-size` must be given: `{folder}` contains {len(pictures)} images, and the model takes any size; "
            "for example --image-size 224x224"
        )
    images.check()
    groups = _groups(pictures, amount)
    note = f"{_counted(sum(map(len, groups)), pictures, folder)}, {images}"
    chosen = amount.chosen(len(pictures))
    return Batches(groups, lambda paths: np.stack([load_image(path, images) for path in paths]), note, chosen)


def _counted(used: int, pictures: Sequence[Path], folder: Path) -> str:
    """Return how many images of a folder are used, and which of its files are not."""
    others = [path for path in files_of(folder) if path.suffix.lower() not in IMAGES]
    kinds = ", ".join(sorted({path.suffix.lower() or path.name for path in others})[:5])
    ignored = f" ({len(others)} other files ignored: {kinds})" if others else ""
    return f"{used}{'' if used == len(pictures) else f' of {len(pictures)}'} pictures{ignored}"


def _of_file(path: Path, amount: Amount) -> Batches:
    """Split arrays along their first axis. An .npy file stays on disk; an .npz file is read once."""
    if path.suffix not in ARRAYS:
        raise InvalidInputError(f"{_EXPECTED}, got `{path}`")
    content = load_arrays(path, mapped=True)
    arrays = content if isinstance(content, dict) else {"array": content}
    lengths = {name: array.shape[0] if array.ndim and array.size else None for name, array in arrays.items()}
    if len(set(lengths.values())) != 1 or not all(lengths.values()):
        raise InvalidInputError(f"arrays of `{path}` must have the same length along the first axis, got {lengths}")
    number = next(iter(arrays.values())).shape[0]
    parts, chosen = _groups(range(number), amount), amount.chosen(number)
    if not isinstance(content, dict):
        return Batches(parts, lambda part: np.array(content[part]), chosen=chosen)
    return Batches(parts, lambda part: {name: array[part] for name, array in arrays.items()}, chosen=chosen)


def _limited(batches: Iterable[Any], amount: Amount) -> Iterable[Any]:
    return batches if amount.max_samples is None else FirstSamples(batches, amount.max_samples)


def _samples(batch: Any) -> Any:
    """Return the array that counts the samples of a batch: a tuple or list holds one for each input."""
    return batch[0] if isinstance(batch, tuple | list) else batch


def _first(batch: Any, number: int) -> Any:
    if isinstance(batch, Mapping):
        return {name: array[:number] for name, array in batch.items()}
    return type(batch)(part[:number] for part in batch) if isinstance(batch, tuple | list) else batch[:number]


def files_of(folder: Path, suffixes: Sequence[str] = ()) -> list[Path]:
    """Return the files with these suffixes, by default all, in the order of their names."""
    files = (path for path in folder.rglob("*") if not suffixes or path.suffix.lower() in suffixes)
    return sorted(path for path in files if path.is_file())


def _groups(items: Sequence[Any], amount: Amount) -> list[list[Any]]:
    """Split the items that are wanted into batches."""
    wanted, size = [items[k] for k in amount.chosen(len(items)).samples], amount.size(len(items))
    return [wanted[begin : begin + size] for begin in range(0, len(wanted), size)]


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
