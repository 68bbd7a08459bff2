"""Trials in a file that is written anew after each of them, from which a tuning that was cut off resumes."""

import hashlib
import json
from pathlib import Path
from typing import Any

from klquant.errors import InvalidInputError

from ..files import read_limited, remove_leftovers, write_atomic
from ..text import without_nan
from .trials import Recipe, Trial

KIND, SCHEMA = "klquant tuning", 1


class TrialLog:
    """The trials so far by recipe, and the file that keeps them; without a path nothing is kept.

    Parameters
    ----------
    path : path, optional
    identity
        What the results depend on: model, data, engine, ...; its ``repr`` is hashed, and the file of another tuning is
        refused.
    """

    def __init__(self, path: str | Path | None, identity: object) -> None:
        self._path = None if path is None else Path(path)
        self._identity = hashlib.sha256(repr(identity).encode()).hexdigest()
        self._trials: dict[Recipe, Trial] = {}
        if self._path and self._path.exists():
            self._trials = {trial.recipe: trial for trial in _load(self._path, self._identity)}
        if self._path:
            remove_leftovers(self._path)
            self._write()  # at once, before there are results to lose

    def find(self, recipe: Recipe) -> Trial | None:
        """Return the trial of a recipe, if there was one."""
        return self._trials.get(recipe)

    def add(self, trial: Trial) -> None:
        """Keep a trial."""
        self._trials[trial.recipe] = trial
        self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        content = {
            "kind": KIND,
            "schema": SCHEMA,
            "identity": self._identity,
            "trials": [trial.as_record() for trial in self._trials.values()],
        }
        write_atomic(self._path, json.dumps(without_nan(content), indent=1, allow_nan=False).encode())


def _load(path: Path, identity: str) -> list[Trial]:
    try:
        content: Any = json.loads(read_limited(path))
        if (content["kind"], content["schema"]) != (KIND, SCHEMA):
            raise ValueError(f"kind {content['kind']!r}, schema {content['schema']!r}")
        trials = [Trial.from_record(record) for record in content["trials"]]
        found = content["identity"]
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InvalidInputError(f"`{path}` must be a tuning file of klquant, got: {error}") from error
    if found != identity:
        raise InvalidInputError(f"`{path}` must come from a tuning of this model, data and options, got another one")
    return trials
