"""Tune a function: try criteria, then leave out the products that cost most, and stop at the target."""

import hashlib
import math
import warnings
from collections.abc import Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Unpack

from klquant.errors import CalibrationWarning, InvalidInputError

from ...accuracy.comparison import Metric, worst
from ...accuracy.latency import interleaved_medians
from ...accuracy.outputs import Outputs, compare_outputs
from ...accuracy.splits import Split, hold_back
from ...accuracy.trial_log import TrialLog
from ...accuracy.trials import Measured, Recipe, Target, Tuned
from ...accuracy.tuning import TuningOptions, split_options
from ...accuracy.tuning import tune as tune_shared
from ...batches import progress_bar
from ...calibration import Calibration
from ...settings import CRITERIA, SettingsOptions
from ..calibration import calibrate
from ..model.arguments import Function, digest_of, jitted
from ..quantization import requantize
from ..quantized_function import QuantizedFunction
from .comparison import named_outputs
from .criterion_choice import auto_thresholds
from .sensitivity import product_of, sensitivity

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
    The trials are the criteria, then products left out: those first whose rounding alone costs the outputs most on one
    batch, see :func:`sensitivity`.
    """
    limits, settings = split_options(options)
    wanted, split = Target.parse(target), hold_back(batches, validation)
    tuner = _JaxTuner(f, params, split, settings, metric)
    log = TrialLog(resume, None if resume is None else tuner.identity())
    with progress_bar("tuning" if progress else "", range(limits.max_runs)) as advance:
        trace = tune_shared(tuner, wanted, limits, log, advance)
    quantized = tuner.make(trace.best.recipe)
    return Tuned(quantized, quantized.calibration, trace)


class _JaxTuner:
    """A function that can be quantized in several ways and measured: a ``Tunable``."""

    criteria = (*CRITERIA, "auto")
    steps = ()

    def __init__(
        self, f: Function, params: Any, split: Split, settings: SettingsOptions, metric: Metric | None
    ) -> None:
        self._f, self._params, self._split, self._settings, self._metric = f, params, split, settings, metric
        self._float = jitted(f)
        self._reference: list[Outputs] = [named_outputs(self._float, params, batch) for batch in split.validation]
        if not self._reference:
            raise InvalidInputError("expected at least one batch to measure on, got none")
        self._first = next(iter(split.validation))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CalibrationWarning)
            self._found = calibrate(f, params, split.calibration, **settings)

    def measure(self, recipe: Recipe) -> Measured:
        """Quantize the function and compare it with the float function."""
        quantized = self.make(recipe)
        run = partial(named_outputs, quantized.function, self._params)
        found = [run(batch) for batch in self._split.validation]
        outputs = compare_outputs(zip(self._reference, found, strict=True))
        agreement = worst([output.agreement for output in outputs])
        value = agreement if self._metric is None else float(self._metric(self._reference, found))
        runs = [partial(named_outputs, self._float, self._params, self._first), partial(run, self._first)]
        float_ms, int8_ms = interleaved_medians(runs, seconds=SECONDS)
        share = len(_products(quantized.thresholds)) / len(_products(self._names))
        return Measured(worst([one.sqnr_db for one in outputs]), value, int8_ms / float_ms, share)

    def make(self, recipe: Recipe) -> QuantizedFunction:
        """Return the function of a recipe; what warnings would say is measured here."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CalibrationWarning)
            found = self._searched(recipe)
            return requantize(self._f, self._params, self._first, found, exclude=recipe.exclude)

    def _searched(self, recipe: Recipe) -> Calibration:
        if recipe.criterion == "auto":
            thresholds = auto_thresholds(self._f, self._params, self._found, self._split.calibration)
        else:
            thresholds = self._found.search_thresholds(criterion=recipe.criterion)  # type: ignore[arg-type]
        return self._found._replace(thresholds=thresholds)

    @property
    def _names(self) -> list[str]:
        """Return the names of all operands that are activations, also of those that stay in floating point."""
        return [*self._found.thresholds, *self._found.skipped]

    def rank(self, recipe: Recipe, min_int8: float) -> list[tuple[str, ...]]:
        """Return what to leave out of INT8, what costs most first."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CalibrationWarning)
            found = self._searched(recipe)
        costs = sensitivity(self._f, self._params, found, list(islice(self._split.calibration, RANKING_BATCHES)))
        most = len(costs) - math.ceil(min_int8 * len(_products(self._names)) - 1e-9)
        groups = {cost.name: tuple(t for t in found.thresholds if product_of(t) == cost.name) for cost in costs}
        return [groups[cost.name] for cost in costs[: max(most, 0)]]

    def identity(self) -> object:
        """Return what the trials depend on."""
        digest = hashlib.sha256()
        for batch in (*self._split.calibration, *self._split.validation):
            digest.update(digest_of(batch).encode())
        return (
            digest.hexdigest(),
            sorted(self._found.model.items()),
            sorted(map(repr, self._settings.items())),
            self._metric is None,
        )


def _products(tensors: Iterable[str]) -> set[str]:
    return {product_of(name) for name in tensors}
