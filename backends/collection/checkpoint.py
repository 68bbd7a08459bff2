"""Resume a calibration where it was cut off: the statistics so far, in a file that is always replaced whole."""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from klquant.errors import InvalidInputError

from ..files import remove_leftovers
from ..npz import load_npz, save_npz
from .bins import HIGHEST, LOWEST, Bins
from .distributed import Group, failing_together, rank_of
from .statistics import Observation, Statistics, empty

_KIND, _SCHEMA = "checkpoint", 2


class Progress(NamedTuple):
    """How far one pass has come."""

    statistics: Statistics
    last_batch: str
    """Digest of the last batch that was counted."""


class Checkpoint:
    """The progress of each pass, and the file that keeps it; without a path nothing is kept.

    Parameters
    ----------
    path : Path, optional
    identity : str
        A digest of model and settings: the file of another calibration is refused.
    seconds : float
        Least time between two writes.

    Raises
    ------
    InvalidInputError
        For the file of another calibration, a damaged or foreign one.
    OSError
        If the file cannot be written. It is written at once, before there are results to lose.
    """

    def __init__(self, path: Path | None = None, identity: str = "", seconds: float = 0.0) -> None:
        self._path, self._identity, self._seconds = path, identity, seconds
        self._passes: dict[str, Progress] = _load(path, identity) if path and path.exists() else {}
        self._finished: set[str] = set()
        if path:
            remove_leftovers(path)
        self.write()

    def start(self, name: str) -> Progress:
        """Return how far a pass has come; a pass that this object has finished starts again."""
        if name in self._finished:
            self._finished.discard(name)
            del self._passes[name]
        return self._passes.get(name, Progress(empty(), ""))

    def keep(self, name: str, progress: Progress) -> None:
        """Keep the progress of a pass, and write it if enough time has passed."""
        if self._path:
            self._passes[name] = progress
            if time.monotonic() - self._written >= self._seconds:
                self.write()

    def finish(self, name: str) -> None:
        """Mark a pass as complete."""
        if name in self._passes:
            self._finished.add(name)

    def write(self) -> None:
        """Write everything. A Ctrl-C during this waits until it is done: the file may hold a whole pass."""
        if self._path:
            try:
                _save(self._path, self._identity, self._passes)
            except KeyboardInterrupt:
                _save(self._path, self._identity, self._passes)
                raise
        self._written = time.monotonic()


def open_checkpoint(resume: str | Path | None, identity: Any, group: Group, seconds: float) -> Checkpoint | None:
    """Return the checkpoint of this process, None if none is wanted.

    Parameters
    ----------
    resume : path or None
        Of several processes each adds its rank.
    identity
        What the calibration depends on: model, settings, ...; its ``repr`` is hashed.
    group : process group or None
    seconds : float
        Least time between two writes.
    """
    if resume is None:
        return None
    with failing_together(group):
        path = Path(resume)
        if group is not None:
            path = path.with_name(f"{path.name}.rank{rank_of(group)}")
        return Checkpoint(path, hashlib.sha256(repr(identity).encode()).hexdigest(), seconds)


def skip(
    batches: Iterable[tuple[int, Any]], progress: Progress, digest: Callable[[Any], str]
) -> Iterator[tuple[int, Any]]:
    """Yield the batches that are not counted yet, with their numbers; refuse data other than those counted before."""
    counted, number = progress.statistics.num_batches, -1
    for number, batch in batches:
        if number >= counted:
            yield number, batch
        elif number == counted - 1 and digest(batch) != progress.last_batch:
            raise InvalidInputError(
                f"`resume` needs the data in the same order, got another batch {number} than the one that was counted"
            )
    if number + 1 < counted:
        raise InvalidInputError(f"`resume` needs the {counted} batches counted before, got {number + 1}")


def _save(path: Path, identity: str, passes: Mapping[str, Progress]) -> None:
    meta: dict[str, Any] = {"identity": identity, "passes": {}}
    arrays: dict[str, Any] = {}
    for key, ((tensors, num_batches), last_batch) in passes.items():
        arrays |= {f"{key}_hist_{k}": s.counts for k, s in enumerate(tensors.values()) if s.counts is not None}
        rows = [[name, s.low, s.high, s.calls, s.bins, s.zeros, s.beyond] for name, s in tensors.items()]
        meta["passes"][key] = [rows, num_batches, last_batch]
    save_npz(path, _KIND, _SCHEMA, meta, arrays)


def _load(path: Path, identity: str) -> dict[str, Progress]:
    meta, arrays = load_npz(path, _KIND, _SCHEMA)
    try:
        passes = {str(key): _read(key, kept, arrays) for key, kept in meta["passes"].items()}
        other = meta["identity"] != identity
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise InvalidInputError(f"`{path}` must be a klquant checkpoint file, got a damaged one: {error}") from error
    if other:
        raise InvalidInputError(f"`{path}` must be a checkpoint of this model with these settings, got a different one")
    return passes


def _read(key: str, kept: Any, arrays: Mapping[str, Any]) -> Progress:
    """Return the progress of one pass; the file is untrusted, so everything is checked."""
    rows, num_batches, last_batch = kept
    if type(num_batches) is not int or num_batches < 0 or not isinstance(last_batch, str):
        raise ValueError(f"impossible batches of `{key}`")
    tensors = {}
    for k, (name, low, high, calls, bins, zeros, beyond) in enumerate(rows):
        counts = arrays[f"{key}_hist_{k}"] if bins else None
        given = Observation(low, high, calls, counts, Bins(*bins) if bins else None, zeros, beyond)
        tensors[str(name)] = _check(key, given)
    return Progress(Statistics(tensors, num_batches), last_batch)


def _check(key: str, seen: Observation) -> Observation:
    fine = {
        "ranges": (_is_finite(seen.low) and _is_finite(seen.high) and seen.low <= seen.high)
        or (seen.low, seen.high) == (math.inf, -math.inf),
        "calls": type(seen.calls) is int and seen.calls > 0,
        "numbers": all(type(number) is int and number >= 0 for number in (seen.zeros, seen.beyond)),
        "bins": seen.bins is None or (_are_bins(seen.bins) and _are_counts(seen.counts, seen.bins)),
    }
    if wrong := [what for what, is_fine in fine.items() if not is_fine]:
        raise ValueError(f"impossible {', '.join(wrong)} of `{key}`")
    return seen


def _is_finite(value: Any) -> bool:
    return isinstance(value, float) and abs(value) < math.inf


def _are_bins(bins: Bins) -> bool:
    level = bins.level
    fine = type(bins.num_bins) is int and bins.num_bins > 0 and _is_finite(bins.amax) and bins.amax > 0
    return fine and (level is None or (type(level) is int and LOWEST <= level <= HIGHEST and bins.amax == 3.0**level))


def _are_counts(counts: Any, bins: Bins) -> bool:
    return bool(counts.shape == (bins.num_bins,) and counts.dtype == np.int64 and counts.min() >= 0)
