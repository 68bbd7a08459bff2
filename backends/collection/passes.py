"""Passes over the calibration data, the same for every backend: two or one, resumed, in one process or several."""

import hashlib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from klquant.errors import InvalidInputError

from ..batches import numbered, tracked
from ..settings import Settings
from .bins import Bins, BinsFor, level_of
from .checkpoint import Checkpoint, Progress, skip
from .distributed import Group, failing_together, join_all, rank_of
from .kept import Kept
from .statistics import Observation, Statistics, join, narrower_ranges

logger = logging.getLogger("klquant")
MAX_ROUNDS = 8  # each narrows the range up to num_bins times
DRIFT = 1.01  # float kernels may round differently from pass to pass; other data exceed this

DIFFERENT_DATA = (
    "the data differ between the passes (random augmentation, other samples, a function without a seed), or the model "
    "itself is random: switch the randomness off, seed it at the start of each pass, keep the batches in a list, or "
    "pass passes=1"
)


class ObservedModel(Protocol):
    """What a backend supplies: a model, seen as pure functions of a batch."""

    @property
    def kind(self) -> str:
        """Return what the names are names of, for messages: `layer` or `tensor`."""

    @property
    def names(self) -> Sequence[str]:
        """Return the names of what may be observed, in the same order in every process."""

    def observe(self, batch: Any, bins_for: BinsFor, number: int) -> dict[str, Observation]:
        """Run the model on a batch; return the range of every tensor, and its counts where `bins_for` gives bins.

        :func:`look` makes an Observation. Errors name the tensor and `number`, which is that of the batch.
        """

    def digest(self, batch: Any) -> str:
        """Return a hash of the data in a batch, which `resume` compares."""


class Run(NamedTuple):
    """How a pass is made."""

    progress: bool = True
    """Show a bar on a terminal or in a notebook; of several processes only the first does."""
    group: Group = None
    """Processes that calibrate together."""
    checkpoint: Checkpoint | None = None
    kept: Kept | None = None
    """What the first pass keeps for the second, with the same Run, model and data; None keeps nothing."""


ALONE = Run()


def collect_ranges(model: ObservedModel, batches: Iterable[Any], *, run: Run = ALONE) -> Statistics:
    """Make the first of two passes: the range of every tensor.

    Parameters
    ----------
    model : ObservedModel
    batches : iterable
        The calibration data of this process.
    run : Run

    Returns
    -------
    Statistics
        Of the data of all processes of ``run.group``.

    Raises
    ------
    InvalidInputError
        For NaN or infinity, naming tensor and batch; if there are no batches.
    """
    with (run.kept or Kept(0)).filling(batches):
        return _run_pass(model, batches, _only_ranges, "ranges", "pass 1: ranges", run)


def _only_ranges(name: str, amax: float) -> None:
    return None


def collect_counts(
    model: ObservedModel,
    batches: Iterable[Any],
    amax: Mapping[str, float],
    settings: Settings,
    *,
    over: Mapping[str, float] | None = None,
    run: Run = ALONE,
) -> Statistics:
    """Make the second of two passes: count every tensor over [-amax, amax].

    Parameters
    ----------
    model, batches, run
        As for :func:`collect_ranges`, with the same data.
    amax : mapping
        By name, from the first pass.
    settings : Settings
    over : mapping, optional
        Other ranges to count over, by name; tensors that it lacks are not counted. By default `amax`, at most
        ``settings.max_amax``.

    Returns
    -------
    Statistics
        Of the data of all processes; tensors that are always 0 have no counts.

    Raises
    ------
    InvalidInputError
        If the data are not those of the first pass, naming tensor and batch.
    """
    ranges = capped(amax, settings.max_amax) if over is None else over

    def bins_for(name: str, seen: float) -> Bins | None:
        if name not in amax:
            raise InvalidInputError(
                f"expected the data of pass 1, got a {model.kind} that was not called there; {DIFFERENT_DATA}"
            )
        if seen > DRIFT * amax[name] and amax[name] < (settings.max_amax or math.inf):
            raise InvalidInputError(
                f"expected the data of pass 1 with amax = {amax[name]}, got a value of {seen}; {DIFFERENT_DATA}"
            )
        return Bins(settings.num_bins, ranges[name]) if ranges.get(name, 0) > 0 else None

    key = hashlib.sha256(repr(sorted(ranges.items())).encode()).hexdigest()  # counts over other ranges do not add up
    with (run.kept or Kept(0)).emptying(batches):
        return _run_pass(model, batches, bins_for, f"counts over {key}", "pass 2: histograms", run)


def collect_resolved(
    model: ObservedModel, batches: Iterable[Any], amax: Mapping[str, float], settings: Settings, *, run: Run = ALONE
) -> Statistics:
    """Make the second of two passes, and as many more as outliers need.

    Parameters
    ----------
    model, batches, amax, settings, run
        As for :func:`collect_counts`.

    Returns
    -------
    Statistics

    Raises
    ------
    InvalidInputError
        As for :func:`collect_counts`.
    """
    counts = collect_counts(model, batches, amax, settings, run=run)
    return resolve_outliers(model, batches, amax, settings, counts, run=run)


def resolve_outliers(
    model: ObservedModel,
    batches: Iterable[Any],
    amax: Mapping[str, float],
    settings: Settings,
    counts: Statistics,
    *,
    run: Run = ALONE,
) -> Statistics:
    """Count again, over narrower ranges, the tensors in which an outlier has put most values into the centre bin.

    Parameters
    ----------
    model, batches, amax, settings, run
        As for :func:`collect_counts`.
    counts : Statistics
        The result of :func:`collect_counts`.

    Returns
    -------
    Statistics
        `counts` with those tensors replaced; no data are read where there are none.

    Raises
    ------
    InvalidInputError
        As for :func:`collect_counts`.
    """
    for _ in range(MAX_ROUNDS):
        over = narrower_ranges(counts)
        if not over:
            break
        logger.info("%d tensors have outliers: counted again over ranges that resolve their other values", len(over))
        again = collect_counts(model, batches, amax, settings, over=over, run=run).tensors
        counts = counts._replace(tensors={**counts.tensors, **{name: again[name] for name in over}})
    return counts


def collect_growing(
    model: ObservedModel, batches: Iterable[Any], settings: Settings, *, run: Run = ALONE
) -> Statistics:
    """Make the only pass: count over ranges that grow by powers of three.

    Parameters
    ----------
    model, batches, settings, run
        As for :func:`collect_counts`.

    Returns
    -------
    Statistics
        With three times ``settings.num_bins`` bins; :func:`histograms_of` cuts off the empty ones.

    Raises
    ------
    InvalidInputError
        As for :func:`collect_ranges`.
    """

    def bins_for(name: str, amax: float) -> Bins:
        level = level_of(min(amax, settings.max_amax or math.inf))  # join() brings all batches to the highest
        return Bins(3 * settings.num_bins, 3.0**level, level)

    return _run_pass(model, batches, bins_for, "growing counts", "one pass: histograms", run)


def capped(amax: Mapping[str, float], max_amax: float | None) -> dict[str, float]:
    """Return the ranges, at most `max_amax` if that is given.

    Parameters
    ----------
    amax : mapping
    max_amax : float, optional

    Returns
    -------
    dict
    """
    return {name: min(largest, max_amax or math.inf) for name, largest in amax.items()}


def _run_pass(
    model: ObservedModel, batches: Iterable[Any], bins_for: BinsFor, key: str, description: str, run: Run
) -> Statistics:
    """Collect batch by batch, from where the checkpoint stopped, and join the statistics of all processes."""
    checkpoint, kept = run.checkpoint or Checkpoint(), run.kept or Kept(0)
    done = checkpoint.start(key)
    with failing_together(run.group):
        shown = description if run.progress and rank_of(run.group) == 0 else ""
        try:
            for number, batch in _to_do(model, batches, shown, done, kept):
                found, digest = kept.observe(model, batch, bins_for, number, with_digest=run.checkpoint is not None)
                done = Progress(join(done.statistics, Statistics(found, 1)), digest)
                checkpoint.keep(key, done)
        finally:
            checkpoint.write()
    total = join_all(done.statistics, model.names, run.group)
    if total.num_batches == 0:
        raise InvalidInputError("expected at least one calibration batch, got none")
    checkpoint.finish(key)
    return total


def _to_do(
    model: ObservedModel, batches: Iterable[Any], description: str, done: Progress, kept: Kept
) -> Iterator[tuple[int, Any]]:
    """Yield the batches that are not counted yet, with their numbers; no data are read if all batches are kept."""
    if (numbers := kept.all_numbers()) and not done.statistics.num_batches:
        return ((number, None) for number in tracked(numbers, description))
    return skip(numbered(tracked(batches, description)), done, model.digest)
