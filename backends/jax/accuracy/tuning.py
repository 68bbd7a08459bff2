"""Tune a function: try criteria, then leave out the products that cost most, and stop at the target."""

import hashlib
import math
from collections.abc import Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Unpack

from ...accuracy.comparison import Metric, score_outputs
from ...accuracy.latency import interleaved_medians
from ...accuracy.splits import hold_back
from ...accuracy.trial_log import TrialLog
from ...accuracy.trials import Measured, Recipe, Target, Tuned
from ...accuracy.tuning import TuningOptions, split_options
from ...accuracy.tuning import tune as tune_shared
from ...batches import progress_bar
from ..model.arguments import Function, digest_of
from ..quantized_function import QuantizedFunction
from .sensitivity import product_of, sensitivity
from .ways import Ways

RANKING_BATCHES = 1  # on which products are quantized one at a time
SECONDS = 0.3  # of a measurement of times


def tune(
    f: Function,
    params: Any,
    batches: Iterable[Any],
    *,
    target: str | float = 0.99,
    metric: Metric | None = None,
    validation: Iterable[Any] | None = None,
    progress: bool = True,
    resume: str | Path | None = None,
    **options: Unpack[TuningOptions],
) -> Tuned[QuantizedFunction]:
    """Try settings, measure each, and stop at the first function that reaches a target.

    Parameters
    ----------
    f : callable (params, *inputs)
    params : pytree
    batches : iterable
        Data to be iterated several times.
    target : str or float
        ``"30dB"``: the SQNR of the worst output; or a number: the metric, by default the agreement of the worst output
        as :func:`compare` measures it.
    metric : callable, optional
        As for :func:`compare`: the larger, the better.
    validation : iterable, optional
        Batches to measure on. By default every fourth of `batches` is held back from calibration for this; of fewer
        than four, all serve both purposes.
    progress : bool
        Show a bar on a terminal.
    resume : path, optional
        JSON file that keeps the trials, written anew after each. If it exists, they are not made again.
    **options
        ``max_runs`` (40), the largest number of quantized functions to try; ``min_int8`` (0.8), the least share of
        products that stays in INT8; and the settings of :func:`calibrate`.

    Returns
    -------
    Tuned
        ``trace.reached`` says whether the target was reached. If not, the function is the most accurate one of all.

    Raises
    ------
    InvalidInputError
        For a target, share or number of runs that is impossible, data that can be iterated only once, a `resume` file
        of another tuning, and as :func:`calibrate`.

    Notes
    -----
    The trials are the criteria, then asymmetric ranges and bias correction on top of the best, then products left out:
    those first whose rounding alone costs the outputs most on one batch, see :func:`sensitivity`.
    """
    limits, settings = split_options(options)
    wanted, split = Target.parse(target), hold_back(batches, validation)
    tuner = _JaxTuner(f, params, split, settings, metric)
    log = TrialLog(resume, None if resume is None else tuner.identity())
    with progress_bar("tuning" if progress else "", range(limits.max_runs)) as advance:
        trace = tune_shared(tuner, wanted, limits, log, advance)
    quantized = tuner.make(trace.best.recipe)
    return Tuned(quantized, quantized.calibration, trace)


class _JaxTuner(Ways):
    """A function that can be quantized in several ways and measured: a ``Tunable``."""

    def measure(self, recipe: Recipe) -> Measured:
        """Quantize the function and compare it with the float function."""
        quantized = self.make(recipe)
        run = self.runner(quantized.function)
        score = score_outputs(
            self.split.validation, self.reference, [run(batch) for batch in self.split.validation], self.metric
        )
        runs = [partial(each, self.first) for each in (self.runner(self.exact), run)]
        float_ms, int8_ms = interleaved_medians(runs, seconds=SECONDS)
        return Measured(*score, int8_ms / float_ms, self.int8_share(quantized))

    def rank(self, recipe: Recipe, min_int8: float) -> list[tuple[str, ...]]:
        """Return what to leave out of INT8, what costs most first."""
        found = self.searched(recipe)
        costs = sensitivity(self.f, self.params, found, list(islice(self.split.calibration, RANKING_BATCHES)))
        most = len(costs) - math.ceil(min_int8 * len(self.products) - 1e-9)
        groups = {cost.name: tuple(t for t in found.thresholds if product_of(t) == cost.name) for cost in costs}
        return [groups[cost.name] for cost in costs[: max(most, 0)]]

    def identity(self) -> object:
        """Return what the trials depend on."""
        digest = hashlib.sha256()
        for batch in (*self.split.calibration, *self.split.validation):
            digest.update(digest_of(batch).encode())
        settings = self.found.settings.as_json()
        return digest.hexdigest(), sorted(self.found.model.items()), repr(settings), self.metric is None
