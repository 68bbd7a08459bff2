"""Trials of a tuning: what was changed, what it gained and what it costs; and the table of that trade."""

import json
import math
import re
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from klquant.errors import InvalidInputError

from ..calibration import Calibration
from ..html_tables import html_table
from ..text import number, percent, without_nan

COLUMNS = ("trial", "SQNR dB", "gain dB", "metric", "time", "int8 layers")
Quantized = TypeVar("Quantized")
_DECIBELS = re.compile(r"\s*(-?\d+(?:\.\d+)?)\s*dB\s*", re.IGNORECASE)


class Target(NamedTuple):
    """What a tuning wants to reach."""

    value: float
    in_db: bool
    """SQNR of the worst output in dB; otherwise the metric, by default the agreement."""

    @classmethod
    def parse(cls, given: "str | float | Target") -> "Target":
        """Return a target from ``"30dB"``, or from a number or its text for the metric."""
        if isinstance(given, Target):
            return given
        text = str(given)
        found = _DECIBELS.fullmatch(text)
        try:
            value = float(found[1] if found else text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise InvalidInputError(f"`target` must be an SQNR such as '30dB' or a metric such as 0.99, got {given!r}")
        return cls(value, found is not None)

    def __str__(self) -> str:
        """Return the target as it can be parsed."""
        return f"{self.value:g}{'dB' if self.in_db else ''}"


class Recipe(NamedTuple):
    """How to quantize a model."""

    criterion: str = "entropy"
    steps: tuple[str, ...] = ()
    """Done besides calibration, by name."""
    exclude: tuple[str, ...] = ()
    """Layers that stay in floating point, by name."""


class Measured(NamedTuple):
    """What one quantized model achieves, on data that calibration has not seen."""

    sqnr_db: float
    """Of the worst output."""
    metric: float
    """The metric that was passed, by default the agreement of the worst output."""
    time_ratio: float
    """Its time as a share of the float model's."""
    int8_share: float
    """Share of the layers with weights that are in INT8."""


class Trial(NamedTuple):
    """One way to quantize a model, and what it achieves."""

    what: str
    """What is new in it."""
    recipe: Recipe
    measured: Measured

    def value(self, target: Target) -> float:
        """Return what the target is about; -inf for NaN."""
        value = self.measured.sqnr_db if target.in_db else self.measured.metric
        return -math.inf if math.isnan(value) else value

    def rank(self, target: Target) -> tuple[float, float]:
        """Return a sort key: the larger, the better is the model."""
        sqnr_db = self.measured.sqnr_db
        return self.value(target), -math.inf if math.isnan(sqnr_db) else sqnr_db

    def as_record(self) -> dict[str, Any]:
        """Return a dict for JSON, with null for NaN and infinity."""
        return {"what": self.what, **self.recipe._asdict(), **self.measured._asdict()}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Trial":
        """Return what :meth:`as_record` returned; raise KeyError, TypeError or ValueError for anything else."""
        recipe = Recipe(str(record["criterion"]), *(tuple(map(str, record[key])) for key in ("steps", "exclude")))
        numbers = (math.nan if record[key] is None else float(record[key]) for key in Measured._fields)
        return cls(str(record["what"]), recipe, Measured(*numbers))


class Trace(NamedTuple):
    """All trials of a tuning."""

    target: Target
    trials: list[Trial]
    best: Trial
    """The one that was chosen."""

    @property
    def reached(self) -> bool:
        """Return whether the chosen model reaches the target."""
        return self.best.value(self.target) >= self.target.value

    def rows(self) -> list[tuple[str, ...]]:
        """Return the cells of a table with `COLUMNS`; the gain is over the first trial."""
        start = self.trials[0].measured.sqnr_db
        return [
            (
                ("* " if trial == self.best else "") + trial.what,
                number(trial.measured.sqnr_db, ".1f"),
                number(trial.measured.sqnr_db - start, "+.1f"),
                number(trial.measured.metric, ".4f"),
                "x " + number(trial.measured.time_ratio, ".2f"),
                percent(trial.measured.int8_share),
            )
            for trial in self.trials
        ]

    def as_json(self) -> str:
        """Return everything as JSON, with null for NaN and infinity."""
        content = {
            "target": str(self.target),
            "reached": self.reached,
            "best": self.best.as_record(),
            "trials": [trial.as_record() for trial in self.trials],
        }
        return json.dumps(without_nan(content), indent=2, allow_nan=False)

    def __str__(self) -> str:
        """Return the result in one line."""
        best = self.best.measured
        outcome = "reached" if self.reached else "not reached"
        return (
            f"target {self.target} {outcome} after {len(self.trials)} trials: {number(best.sqnr_db, '.1f')} dB, "
            f"metric {number(best.metric, '.4f')}, x {number(best.time_ratio, '.2f')} of the time, "
            f"{percent(best.int8_share)} of the layers in INT8"
        )

    def __repr__(self) -> str:
        """Return the result in one line."""
        return f"Trace({self})"

    def _repr_html_(self) -> str:
        """Return a table of the trials for notebooks."""
        return html_table(str(self), COLUMNS, self.rows())


class Tuned(NamedTuple, Generic[Quantized]):
    """The result of ``tune``."""

    quantized: Quantized
    """What ``quantize`` returned for the chosen trial."""
    calibration: Calibration
    """With the thresholds of the chosen trial. It fits `model` if that is given, else the model that was passed."""
    trace: Trace
    """All trials, and the one that was chosen: ``trace.best.recipe`` says how its model was made."""
    model: Any = None
    """The float model that ``smooth``, or ``equalize`` of ONNX models, made for the chosen trial; else None."""

    def __repr__(self) -> str:
        """Return the result in one line."""
        return f"Tuned({self.trace})"

    def _repr_html_(self) -> str:
        """Return a table of the trials for notebooks."""
        return self.trace._repr_html_()


def best_of(trials: Sequence[Trial], target: Target) -> Trial:
    """Return the trial to choose: of those that reach the target the one with the most INT8, else the most accurate."""
    reaching = [trial for trial in trials if trial.value(target) >= target.value]
    if reaching:
        return max(
            reaching, key=lambda trial: (trial.measured.int8_share, -len(trial.recipe.exclude), trial.rank(target))
        )
    return max(trials, key=lambda trial: trial.rank(target))
