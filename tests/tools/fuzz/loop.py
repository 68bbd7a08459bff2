"""The loop over the inputs (seeds, then damaged seeds, each reproducible from its number), and its results."""

import faulthandler
import random
import time
import traceback
import warnings
from collections import Counter
from typing import NamedTuple

from klquant.errors import KLQuantError

MAX_FAILURES = 20
RATE_OF_BOMBS = 0.1


class Account(NamedTuple):
    """The results of the inputs."""

    inputs: int
    seconds: float
    errors: int
    """Number of inputs that raised a KLQuantError."""
    accepted: int
    worst: float
    """Seconds of the slowest input."""
    failures: dict[str, int]
    """Number of failures by error and place."""


class Attempts:
    """Tries inputs on one target, and keeps those that fail in a folder."""

    def __init__(self, name, target, folder, failed):
        self._name, self._target, self._folder, self._failed = name, target, folder, failed
        self._outcomes, self._failures, self._worst, self._start = Counter(), Counter(), 0.0, time.monotonic()

    def account(self):
        passed = {key: self._outcomes[key] for key in ("errors", "accepted")}
        seconds = time.monotonic() - self._start
        return Account(self._outcomes.total(), seconds, **passed, worst=self._worst, failures=dict(self._failures))

    def attempt(self, data):
        """Try one input. A hang ends the process and prints where."""
        faulthandler.dump_traceback_later(self._target.seconds, exit=True)
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", RuntimeWarning)  # NumPy warns if a number silently became another
                self._target.call(self._folder, data)
            self._outcomes["accepted"] += 1
        except KLQuantError:
            self._outcomes["errors"] += 1
        except Exception as error:
            self._outcomes["failures"] += 1
            self._keep(data, error)
        finally:
            faulthandler.cancel_dump_traceback_later()
        self._worst = max(self._worst, time.perf_counter() - start)

    def _keep(self, data, error):
        place = traceback.extract_tb(error.__traceback__)[-1]
        kind = f"{type(error).__name__}: {error!s:.80} ({place.filename.rpartition('/')[2]}:{place.lineno})"
        self._failures[kind] += 1
        if self._failures[kind] == 1 and len(self._failures) <= MAX_FAILURES:
            self._failed.mkdir(parents=True, exist_ok=True)
            file = self._failed / f"{self._name.replace(' ', '-')}-{len(self._failures)}"
            file.write_bytes(data)
            file.with_name(f"{file.name}.txt").write_text("".join(traceback.format_exception(error)), errors="replace")


def damaged(name, target, folder, seed):
    """Yield the seeds, then an endless stream of damaged ones."""
    seeds, bombs = list(target.seeds(folder)), list(target.bombs())
    yield from (*seeds, *bombs)
    number = 0
    while True:
        number += 1
        source = random.Random(f"{seed} {name} {number}")  # noqa: S311
        start = source.choice(bombs if bombs and source.random() < RATE_OF_BOMBS else seeds)
        yield target.mutate(start, source, seeds)
