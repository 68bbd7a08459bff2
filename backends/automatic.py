"""Try every criterion and step once, and say whether the best result is accurate enough."""

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

from klquant.errors import InvalidInputError, ModelError

from .accuracy.comparison import Comparison, Metric
from .accuracy.trials import Recipe, Target
from .batches import progress_bar
from .calibration import Calibration
from .html_tables import html_table
from .text import milliseconds, number, percent, without_nan

Advice: TypeAlias = Literal["verify", "tune", "data", "held-out", "inspect", "slow", "labels"]
Quantized = TypeVar("Quantized")
COLUMNS = ("method", "SQNR dB", "agreement", "MB", "ms", "in INT8")
FEW = 64  # samples: with fewer, thresholds and agreement depend much on each of them
GAIN_DB = 0.2  # a step has to gain more than noise
NEXT: dict[Advice, str] = {
    "verify": "report this at https://github.com/klquant/klquant/issues: the engine computes something else",
    "tune": "tune(model, batches, target=...) leaves the layers that cost most in floating point",
    "held-out": "pass validation=: data that calibration has not seen",
    "data": "pass more data: 100 to 500 typical samples make all numbers more reliable",
    "inspect": "quantized.skipped says why some layers stay in floating point",
    "slow": "INT8 is slower here: measure on the machine that will run the model",
    "labels": "compare(..., labels=...) measures the accuracy on your labels",
}
logger = logging.getLogger("klquant")


class Attempt(NamedTuple):
    """One way to quantize a model, and what it achieves on data that calibration has not seen."""

    recipe: Recipe
    sqnr_db: float
    """Of the worst output."""
    agreement: float
    """The metric that was passed, by default the agreement of the worst output."""
    num_bytes: int
    """Of its file, or of its parameters."""
    ms: float
    """Median time of a batch on one thread; NaN if the engine was not run."""
    float_ms: float
    """That of the float model, measured in turns with it."""
    int8_share: float
    """Share of the layers with weights that are in INT8."""

    @classmethod
    def of(cls, recipe: Recipe, found: Comparison, int8_share: float) -> "Attempt":
        """Return the attempt that a comparison measured."""
        value = found.agreement if math.isnan(found.metric) else found.metric
        return cls(recipe, found.sqnr_db, value, found.int8_bytes, found.int8_ms, found.float_ms, int8_share)

    @property
    def what(self) -> str:
        """Return criterion and steps, such as ``mse + correct_bias``."""
        return " + ".join((self.recipe.criterion, *self.recipe.steps))

    def reaches(self, target: Target) -> bool:
        """Return whether this is as accurate as wanted."""
        return self.value(target) >= target.value

    def value(self, target: Target) -> float:
        """Return what the target is about; -inf for NaN."""
        value = self.sqnr_db if target.in_db else self.agreement
        return -math.inf if math.isnan(value) else value


class Data(NamedTuple):
    """How much data there was."""

    calibrated: int
    """Batches of calibration."""
    measured: int
    """Samples that the accuracy comes from."""
    held_out: bool
    """Whether they were held back from calibration."""


class Automatic(NamedTuple, Generic[Quantized]):
    """The result of ``auto``."""

    quantized: Quantized
    """What ``quantize`` returned for the best attempt."""
    calibration: Calibration
    """With the thresholds of the best attempt."""
    attempts: list[Attempt]
    best: Attempt
    target: Target
    measure: str
    """What `agreement` is: top-1, cosine or metric; for outputs of both kinds agreement, the worst of them."""
    data: Data
    float_bytes: int
    verification: Any = None
    """A Verification of the best attempt in its engine; None if no engine was run."""
    left_out: tuple[str, ...] = ()
    """Methods that were not tried within the time limit."""

    @property
    def reached(self) -> bool:
        """Return whether the best attempt reaches the target and its engine computes what it says."""
        wrong = self.verification is not None and bool(self.verification.wrong)
        return not wrong and self.best.value(self.target) >= self.target.value

    @property
    def verdict(self) -> str:
        """Return the result in one sentence."""
        if self.verification is not None and self.verification.wrong:
            return f"Do not use this model: {self.verification}"
        best, data = self.best, self.data
        outcome = "Accurate enough" if self.reached else "Not accurate enough"
        where = "that calibration has not seen" if data.held_out else "of the calibration itself"
        measure = "top-1 agreement" if self.measure == "top-1" else self.measure
        accuracy = f"{measure} is {number(best.agreement, '.4f')} and SQNR {number(best.sqnr_db, '.1f')} dB"
        samples = f"{data.measured} samples {where} (target {self.target})"
        return f"{outcome}: with {best.what}, {accuracy} on {samples}; {self._costs()}"

    def _costs(self) -> str:
        size = f"{number(self.best.num_bytes / 1e6, '.3g')} instead of {number(self.float_bytes / 1e6, '.3g')} MB"
        if math.isnan(self.best.ms):
            return size
        return f"{size}, {self._ms(self.best)} instead of {milliseconds(self._float_ms)} ms per batch"

    @property
    def _float_ms(self) -> float:
        """Return the median time of the float model; NaN if the engine was not run."""
        times = [one.float_ms for one in self.attempts if not math.isnan(one.float_ms)]
        return sorted(times)[len(times) // 2] if times else math.nan

    def _ms(self, one: Attempt) -> str:
        """Return the time of an attempt: its ratio to the float model, times the latter's median over all attempts."""
        return milliseconds(one.ms / one.float_ms * self._float_ms)

    @property
    def advice(self) -> list[Advice]:
        """Return what to do next, the most urgent first."""
        best, wrong = self.best, self.verification is not None and self.verification.wrong
        wanted: dict[Advice, bool] = {
            "verify": bool(wrong),
            "tune": not self.reached and not wrong,
            "held-out": not self.data.held_out,
            "data": self.data.measured < FEW,
            "inspect": best.int8_share < 1,
            "slow": best.ms > best.float_ms,
            "labels": self.reached,
        }
        return [name for name, is_wanted in wanted.items() if is_wanted]

    @property
    def next_steps(self) -> list[str]:
        """Return what to do next in Python, the most urgent first."""
        return [NEXT[name] for name in self.advice]

    def rows(self) -> list[tuple[str, ...]]:
        """Return the cells of a table with `COLUMNS`; `*` marks the best attempt.

        Each attempt was timed in turns with the float model. The table scales all times to one time of the float model,
        so that they can be compared even if the machine was busy with other work for a while.
        """
        floats = ("float model", "", "", number(self.float_bytes / 1e6, ".3g"), milliseconds(self._float_ms), "")
        return [floats, *map(self._row, self.attempts)]

    def _row(self, one: Attempt) -> tuple[str, ...]:
        name = ("* " if one is self.best else "") + one.what
        numbers = number(one.sqnr_db, ".1f"), number(one.agreement, ".4f"), number(one.num_bytes / 1e6, ".3g")
        return name, *numbers, self._ms(one), percent(one.int8_share)

    def as_json(self) -> str:
        """Return everything but the model and its calibration as JSON, with null for NaN and infinity."""
        content = {
            "reached": self.reached,
            "target": str(self.target),
            "verdict": self.verdict,
            "best": self.best.what,
            "measure": self.measure,
            "float_bytes": self.float_bytes,
            "attempts": [{"what": one.what, **one._asdict()} for one in self.attempts],
            "data": self.data,
            "advice": self.advice,
            "verification": None if self.verification is None else str(self.verification),
            "left_out": self.left_out,
        }
        return json.dumps(without_nan(content), indent=2, allow_nan=False)

    def __str__(self) -> str:
        """Return the verdict."""
        return self.verdict

    def __repr__(self) -> str:
        """Return the verdict."""
        return f"Automatic({self.verdict})"

    def _repr_html_(self) -> str:
        """Return a table of the attempts for notebooks."""
        return html_table(self.verdict, COLUMNS, self.rows())


class Quantizable(Protocol):
    """What a backend supplies: a model that can be quantized in several ways, and measured."""

    @property
    def criteria(self) -> Sequence[str]:
        """Return the criteria to try, the first one first."""

    @property
    def steps(self) -> Sequence[str]:
        """Return the names of the steps to try on top of the best."""

    @property
    def last_steps(self) -> Sequence[str]:
        """Return the names of steps that take long or cost speed: tried only if the target is not reached without."""

    def attempt(self, recipe: Recipe) -> Attempt:
        """Quantize the model and compare it with the float model."""


def try_until(
    end: float, model: Quantizable, target: Target, samples: int, metric: Metric | None, *, progress: bool
) -> tuple[list[Attempt], Attempt, tuple[str, ...]]:
    """Try everything under a progress bar, until `end` as `time.perf_counter` counts; returns what `try_all` does.

    Without a metric, shares that differ by no more than one of the samples count as equal.
    """
    tolerance = 1 / samples if metric is None else 0.0
    number = len((*model.criteria, *model.steps, *model.last_steps))
    with progress_bar("trying" if progress else "", range(number)) as advance:
        limits: dict[str, Any] = {"max_seconds": end - time.perf_counter(), "advance": advance}
        return try_all(model, better_than(target, tolerance), target, **limits)


def try_all(
    model: Quantizable,
    is_better: Callable[[Attempt, Attempt], bool],
    target: Target,
    *,
    max_seconds: float,
    advance: Callable[[], None] = lambda: None,
) -> tuple[list[Attempt], Attempt, tuple[str, ...]]:
    """Try all criteria, then each step on top of the best so far; last steps only until the target is reached.

    Parameters
    ----------
    model : Quantizable
    is_better : callable
        Whether the first attempt is better than the second.
    target : Target
    max_seconds : float
        No attempt is started that would end later if it took as long as the longest so far. The first is always made.
    advance : callable
        Called after each attempt.

    Returns
    -------
    tuple
        All attempts, the best one, and the methods that were left out.
    """
    begin, longest = time.perf_counter(), 0.0
    attempts: list[Attempt] = []
    best: Attempt | None = None
    left_out: list[str] = []
    for way in (*model.criteria, *model.steps, *model.last_steps):
        start = time.perf_counter()
        if way in model.last_steps and best is not None and best.reaches(target):
            continue
        if best is not None and start - begin + longest > max_seconds:
            left_out.append(way)
            continue
        recipe = Recipe(way) if way in model.criteria else _with_step(best, way)
        try:
            found = model.attempt(recipe)
        except ModelError as error:
            if best is None:
                raise
            logger.info("%s failed: %s", recipe, error)
        else:
            attempts.append(found)
            best = found if best is None or is_better(found, best) else best
        longest = max(longest, time.perf_counter() - start)
        advance()
    if best is None:
        raise InvalidInputError("expected at least one criterion to try, got none")
    return attempts, best, tuple(left_out)


def _with_step(best: Attempt | None, step: str) -> Recipe:
    base = Recipe() if best is None else best.recipe
    return base._replace(steps=(*base.steps, step))


def better_than(target: Target, tolerance: float) -> Callable[[Attempt, Attempt], bool]:
    """Return the comparison of two attempts: first whether they reach the target, then its value, then the SQNR.

    Values that differ by no more than `tolerance` count as equal: one sample more or less.
    """

    def is_better(one: Attempt, other: Attempt) -> bool:
        values = one.value(target), other.value(target)
        reach = [each.reaches(target) for each in (one, other)]
        if reach[0] != reach[1]:
            return reach[0]
        if not target.in_db and abs(values[0] - values[1]) > tolerance:
            return values[0] > values[1]
        return one.sqnr_db > other.sqnr_db + GAIN_DB

    return is_better


def check_limit(max_seconds: float) -> None:
    """Raise InvalidInputError unless this is a positive number."""
    if not max_seconds > 0:
        raise InvalidInputError(f"`max_seconds` must be positive, got {max_seconds!r}")
