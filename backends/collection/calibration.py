"""From a model that a backend can observe, and data, to a calibration."""

import logging
import math
from collections.abc import Iterable
from typing import Any

from klquant.errors import InvalidInputError

from ..batches import check_repeatable
from ..calibration import Calibration
from ..settings import Criterion
from ..warning import warn
from .distributed import warning_once
from .passes import ALONE, DIFFERENT_DATA, DRIFT, ObservedModel, Run, collect_growing, collect_ranges, collect_resolved
from .statistics import Statistics, histograms_of

logger = logging.getLogger("klquant")


def calibrate(
    model: ObservedModel,
    batches: Iterable[Any],
    blank: Calibration,
    *,
    criterion: Criterion = "entropy",
    run: Run = ALONE,
) -> Calibration:
    """Observe a model on data and choose the threshold of every tensor.

    Parameters
    ----------
    model : ObservedModel
    batches : iterable
        The calibration data of this process. Two passes need one that can be iterated twice.
    blank : Calibration
        What is known before the data: settings, and what the backend knows of the model.
    criterion : {"entropy", "max", "percentile", "mse"}
    run : Run
        Progress bars, the processes that calibrate together, and the checkpoint.

    Returns
    -------
    Calibration
        `blank` with ranges, histograms and thresholds.

    Raises
    ------
    InvalidInputError
        For an iterator where two passes are needed, no batches, NaN or infinity, other data in the second pass.
    """
    settings = blank.settings
    if settings.passes == 1:
        ranges, counts = None, collect_growing(model, batches, settings, run=run)
    else:
        check_repeatable(batches, "pass a list or a DataLoader, or passes=1")
        ranges = collect_ranges(model, batches, run=run)
        logger.info("pass 1: the ranges of %d tensors in %d batches", len(ranges.tensors), ranges.num_batches)
        counts = collect_resolved(model, batches, ranges.amax, settings, run=run)
    found = to_calibration(counts, blank, ranges=ranges)
    logger.info("%s: %d histograms", "one pass" if ranges is None else "pass 2", len(found.histograms))
    with warning_once(run.group):
        return found._replace(thresholds=found.search_thresholds(criterion=criterion))


def to_calibration(counts: Statistics, blank: Calibration, *, ranges: Statistics | None = None) -> Calibration:
    """Return what the passes found as a calibration; thresholds are not searched yet.

    Parameters
    ----------
    counts : Statistics
        Of :func:`collect_counts` or :func:`collect_growing`, over all data.
    blank : Calibration
        What is known before the data, with the settings of those passes.
    ranges : Statistics, optional
        Of :func:`collect_ranges` over all data, if there were two passes.

    Returns
    -------
    Calibration

    Raises
    ------
    InvalidInputError
        If the passes had different numbers of batches.
    """
    seen = counts if ranges is None else ranges
    if counts.num_batches != seen.num_batches:
        raise InvalidInputError(
            f"expected the {seen.num_batches} batches of pass 1, got {counts.num_batches} in pass 2"
        )
    _warn_of_other_data(seen, counts)
    histograms = histograms_of(counts, blank.settings.max_amax or math.inf)
    return blank._replace(
        amax=seen.amax,
        ranges={name: (one.low, one.high) if one.low <= one.high else (0.0, 0.0) for name, one in seen.tensors.items()},
        calls={name: one.calls for name, one in seen.tensors.items()},
        histograms={name: histogram for name, (histogram, _) in histograms.items()},
        beyond={name: number for name, (_, number) in histograms.items() if number},
        zeros={name: counts.tensors[name].zeros for name in histograms},
        num_batches=seen.num_batches,
    )


def _warn_of_other_data(first: Statistics, second: Statistics) -> None:
    """Warn if the values of the second pass reach less far than those of the first: larger ones are refused there."""
    for name, one in first.tensors.items():
        again = second.tensors.get(name, one)
        if one.amax > DRIFT * again.amax:
            warn(f"tensor `{name}` had amax = {one.amax} in pass 1, got {again.amax} in pass 2; {DIFFERENT_DATA}")
            return
