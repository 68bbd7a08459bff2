"""Tune a model: try criteria and steps, then leave out the layers that cost most, and stop at the target."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from klquant.errors import InvalidInputError

from ..settings import SettingsOptions
from .trial_log import TrialLog
from .trials import Measured, Recipe, Target, Trace, Trial, best_of

logger = logging.getLogger("klquant")


class Limits(NamedTuple):
    """How far a tuning goes."""

    max_runs: int = 40
    """Largest number of trials, those of the log included."""
    min_int8: float = 0.8
    """Least share of the layers with weights that stay in INT8."""

    def check(self) -> None:
        """Raise InvalidInputError for a number of runs below 1, or a share outside 0 .. 1."""
        if not isinstance(self.max_runs, int) or self.max_runs < 1:
            raise InvalidInputError(f"`max_runs` must be at least 1, got {self.max_runs!r}")
        if not 0 <= self.min_int8 <= 1:
            raise InvalidInputError(f"`min_int8` must be between 0 and 1, got {self.min_int8!r}")


class TuningOptions(SettingsOptions, total=False):
    """The fields of Limits and of Settings as keyword arguments."""

    max_runs: int
    min_int8: float


def split_options(options: TuningOptions) -> tuple[Limits, Any]:
    """Return the limits, checked, and the settings, to which a backend may have added some."""
    given: dict[str, Any] = {**options}
    limits = Limits(**{name: given.pop(name) for name in Limits._fields if name in given})
    limits.check()
    return limits, given


class Tunable(Protocol):
    """What a backend supplies: a model that can be quantized in several ways, and measured."""

    @property
    def criteria(self) -> Sequence[str]:
        """Return the criteria to try, the first one first."""

    @property
    def steps(self) -> Sequence[str]:
        """Return the names of the steps to try, in the order in which they are applied."""

    @property
    def last_steps(self) -> Sequence[str]:
        """Return the names of steps that take long: they are tried once, when the criterion is chosen."""

    def measure(self, recipe: Recipe) -> Measured:
        """Quantize the model and compare it with the float model."""

    def rank(self, recipe: Recipe, min_int8: float) -> list[tuple[str, ...]]:
        """Return what to leave out of INT8, what costs most first, until less than that share of the layers stays.

        Each item is the names of layers that are left out together.
        """


class OutOfRunsError(Exception):
    """The number of trials that was asked for is used up."""


class _Trials:
    """Makes trials and keeps them; one that was made before is not made again."""

    def __init__(
        self, model: Tunable, target: Target, max_runs: int, log: TrialLog, advance: Callable[[], None]
    ) -> None:
        self.model, self.target = model, target
        self.made: list[Trial] = []
        self._max_runs, self._log, self._advance = max_runs, log, advance

    def measure(self, what: str, recipe: Recipe) -> Trial:
        """Return the trial of a recipe."""
        for trial in self.made:
            if trial.recipe == recipe:
                return trial
        if len(self.made) >= self._max_runs:
            raise OutOfRunsError
        found = self._log.find(recipe)
        if found is None:
            found = Trial(what, recipe, self.model.measure(recipe))
            self._log.add(found)
        self.made.append(found)
        self._advance()
        logger.info("trial %d, %s: %s", len(self.made), what, found.measured)
        return found

    def reaches(self, trial: Trial) -> bool:
        """Return whether a trial reaches the target."""
        return trial.value(self.target) >= self.target.value

    @property
    def best(self) -> Trial:
        """Return the best trial so far."""
        return best_of(self.made, self.target)


def tune(
    model: Tunable,
    target: Target,
    limits: Limits,
    log: TrialLog,
    advance: Callable[[], None] = lambda: None,
) -> Trace:
    """Try ways to quantize a model until one reaches a target.

    Parameters
    ----------
    model : Tunable
    target : Target
    limits : Limits
    log : TrialLog
        Trials that were made before are taken from it.
    advance : callable
        Called after each trial.

    Returns
    -------
    Trace
        Its `best` is no worse than the first trial, in what the target measures.
    """
    trials = _Trials(model, target, limits.max_runs, log, advance)
    try:
        _try_whole_models(trials)
        if not trials.reaches(trials.best):
            _leave_out(trials, limits.min_int8)
    except OutOfRunsError:
        logger.info("all %d runs used", limits.max_runs)
    return Trace(target, trials.made, trials.best)


def _try_whole_models(trials: _Trials) -> None:
    """Try the criteria, steps on top of the best, the criteria with these, and last steps, until the target is reached.

    What is the best criterion may be another one after a step: smoothing leaves nothing that is worth clipping. A last
    step chooses ranges and corrections itself, so it is tried by itself, too.
    """
    for criterion in trials.model.criteria:
        trials.measure(f"criterion {criterion}", Recipe(criterion))
        if trials.reaches(trials.best):
            return
    _try_steps(trials, trials.model.steps)
    steps = trials.best.recipe.steps
    for criterion in trials.model.criteria if steps else ():
        if trials.reaches(trials.best):
            return
        _try(trials, Recipe(criterion, steps))
    best = trials.best.recipe
    for step in trials.model.last_steps:
        for base in (Recipe(trials.model.criteria[0]), best):
            if trials.reaches(trials.best):
                return
            _try(trials, base._replace(steps=(*base.steps, step)))


def _try_steps(trials: _Trials, steps: Sequence[str]) -> None:
    for step in steps:
        if trials.reaches(trials.best):
            return
        base = trials.best.recipe
        _try(trials, base._replace(steps=(*base.steps, step)))


def _try(trials: _Trials, recipe: Recipe) -> None:
    trials.measure(" + ".join((recipe.criterion, *recipe.steps)), recipe)


def _leave_out(trials: _Trials, min_int8: float) -> None:
    """Leave out as few layers as the target needs, by bisection of the ranking, then put back what was not needed.

    The last steps are not part of these trials: they take long, and leave out layers by themselves.
    """
    last = set(trials.model.last_steps)
    base = best_of([trial for trial in trials.made if last.isdisjoint(trial.recipe.steps)], trials.target).recipe
    ranking = trials.model.rank(base, min_int8)

    def without(groups: Sequence[tuple[str, ...]], note: str = "the worst left out") -> Trial:
        names = dict.fromkeys(name for group in groups for name in group)
        return trials.measure(f"{len(groups)} of {note}", base._replace(exclude=tuple(names)))

    low, high = 0, 1
    while high < len(ranking) and not trials.reaches(without(ranking[:high])):
        low, high = high, 2 * high
    high = min(high, len(ranking))
    if not high or not trials.reaches(without(ranking[:high])):
        return
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if trials.reaches(without(ranking[:middle])) else (middle, high)
    _put_back(trials, ranking[:high], without)


def _put_back(
    trials: _Trials, left_out: list[tuple[str, ...]], without: Callable[[Sequence[tuple[str, ...]], str], Trial]
) -> None:
    """Put back parts of what is left out, in halves, quarters, ..., as long as the target is reached."""
    size = len(left_out) // 2
    while size:
        for begin in range(0, len(left_out), size):
            fewer = left_out[:begin] + left_out[begin + size :]
            if fewer and trials.reaches(without(fewer, "these left out")):
                left_out = fewer
                break
        else:
            size //= 2
