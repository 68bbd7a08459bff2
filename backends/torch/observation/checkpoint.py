"""Go on where a calibration was cut off: the statistics so far, in a file that is replaced whole."""

import hashlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from klquant.errors import InvalidInputError

from ...batches import numbered
from ...collection import HIGHEST, LOWEST, Statistics, nothing
from ...files import remove_leftovers
from ...npz import load_npz, save_npz
from ..model.layers import tensor_bytes

_KIND, _SCHEMA = "checkpoint", 1


class Progress(NamedTuple):
    """How far one pass has come."""

    statistics: Statistics
    num_batches: int
    last_batch: str
    """Digest of the last batch that was counted."""


class Checkpoint:
    """The progress of each pass, and the file it is kept in; without a path nothing is kept.

    Parameters
    ----------
    path : Path, optional
    identity : str
        A digest of model and settings: the file of another calibration is refused.
    seconds : float
        How often to write, at most.

    Raises
    ------
    InvalidInputError
        For the file of another calibration, a damaged or foreign one.
    OSError
        If the file cannot be written: that shows here, and not when there is something to lose.
    """

    def __init__(self, path: Path | None = None, identity: str = "", seconds: float = 0.0) -> None:
        self._path, self._identity, self._seconds = path, identity, seconds
        self._passes: dict[str, Progress] = _load(path, identity) if path and path.exists() else {}
        self._finished: set[str] = set()
        if path:
            remove_leftovers(path)
        self.write()

    def start(self, name: str) -> Progress:
        """Return how far a pass has come; one that this object saw to its end is begun anew."""
        if name in self._finished:
            self._finished.discard(name)
            del self._passes[name]
        return self._passes.get(name, Progress(nothing(), 0, ""))

    def digest(self, batch: Any) -> str:
        """Return what tells this batch from others, where that is to be kept."""
        return _digest(batch) if self._path else ""

    def keep(self, name: str, progress: Progress) -> None:
        """Take note of the progress of a pass, and write it down if it is time."""
        if self._path:
            self._passes[name] = progress
            if time.monotonic() - self._written >= self._seconds:
                self.write()

    def finish(self, name: str) -> None:
        """Take note that a pass has come to its end."""
        if name in self._passes:
            self._finished.add(name)

    def write(self) -> None:
        """Write all that is known, also if a Ctrl-C comes meanwhile: it may be all of a pass."""
        if self._path:
            try:
                _save(self._path, self._identity, self._passes)
            except KeyboardInterrupt:
                _save(self._path, self._identity, self._passes)
                raise
        self._written = time.monotonic()


def skip(batches: Iterable[Any], progress: Progress) -> Iterator[Any]:
    """Yield the batches that are not yet counted; refuse data that are not the ones counted before."""
    number = -1
    for number, batch in numbered(batches):
        if number >= progress.num_batches:
            yield batch
        elif number == progress.num_batches - 1 and _digest(batch) != progress.last_batch:
            raise InvalidInputError(
                f"`resume` needs the data in the same order, got another batch {number} than the one that was counted"
            )
    if number + 1 < progress.num_batches:
        raise InvalidInputError(f"`resume` needs the {progress.num_batches} batches counted before, got {number + 1}")


def _digest(batch: Any) -> str:
    """Return a hash of the tensors, arrays, numbers and texts in a batch."""
    found = hashlib.sha256()
    for leaf in tree_leaves(batch):
        if isinstance(leaf, torch.Tensor):
            found.update(tensor_bytes(leaf))
        elif isinstance(leaf, np.ndarray):
            found.update(np.ascontiguousarray(leaf).tobytes())
        elif isinstance(leaf, (str, int, float)):
            found.update(repr(leaf).encode())
    return found.hexdigest()


def _save(path: Path, identity: str, passes: dict[str, Progress]) -> None:
    meta: dict[str, Any] = {"identity": identity, "passes": {}}
    arrays: dict[str, Any] = {}
    for key, ((amax, calls, hist, level), num_batches, last_batch) in passes.items():
        arrays |= {f"{key}_hist_{k}": counts for k, counts in enumerate(hist.values())}
        meta["passes"][key] = [amax, calls, list(hist), level, num_batches, last_batch]
    save_npz(path, _KIND, _SCHEMA, meta, arrays)


def _load(path: Path, identity: str) -> dict[str, Progress]:
    meta, arrays = load_npz(path, _KIND, _SCHEMA)
    try:
        passes = {str(key): _read(key, kept, arrays) for key, kept in meta["passes"].items()}
        other = meta["identity"] != identity
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidInputError(f"`{path}` must be a klquant checkpoint file, got a damaged one: {error}") from error
    if other:
        raise InvalidInputError(f"`{path}` must be a checkpoint of this model with these settings, got another's")
    return passes


def _read(key: str, kept: Any, arrays: Mapping[str, Any]) -> Progress:
    """Return the progress of one pass, as checked as if anybody could have written it."""
    amax, calls, names, level, num_batches, last_batch = kept
    hist = {str(name): arrays[f"{key}_hist_{k}"] for k, name in enumerate(names)}
    fine = {
        "ranges": all(isinstance(value, float) and 0 <= value < math.inf for value in amax.values()),
        "calls": all(type(number) is int and number > 0 for number in calls.values()),
        "levels": all(type(number) is int and LOWEST <= number <= HIGHEST for number in level.values()),
        "counts": all(array.ndim == 1 and array.dtype == np.int64 and array.min() >= 0 for array in hist.values()),
        "batches": type(num_batches) is int and num_batches >= 0 and isinstance(last_batch, str),
    }
    if wrong := [what for what, is_fine in fine.items() if not is_fine]:
        raise ValueError(f"impossible {', '.join(wrong)} of `{key}`")
    return Progress(Statistics(amax, calls, hist, level), num_batches, last_batch)
