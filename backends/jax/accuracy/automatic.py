"""Quantize a function in every way and keep the best: one call from a float function to INT8 and its accuracy."""

import time
from collections.abc import Iterable
from typing import Any, Unpack

from ...accuracy.comparison import Metric, compare_models, kind_of_agreement
from ...accuracy.outputs import count_samples
from ...accuracy.splits import hold_back
from ...accuracy.trials import Recipe, Target
from ...automatic import Attempt, Automatic, Data, check_limit, try_until
from ...settings import EXCLUDED, SettingsOptions
from ...warning import warn_of_floats
from ..model.arguments import Function
from ..quantized_function import QuantizedFunction
from .comparison import num_bytes
from .ways import Ways


def auto(
    f: Function,
    params: Any,
    batches: Iterable[Any],
    *,
    target: str | float = 0.99,
    metric: Metric | None = None,
    validation: Iterable[Any] | None = None,
    max_seconds: float = 240.0,
    progress: bool = True,
    **settings: Unpack[SettingsOptions],
) -> Automatic[QuantizedFunction]:
    """Quantize a function by every criterion and with every step, and compare each with the float function.

    Parameters
    ----------
    f : callable (params, *inputs)
    params : pytree
    batches : iterable
        Data to be iterated several times.
    target : str or float
        What is accurate enough: ``"30dB"`` is the SQNR of the worst output; a number is the metric, by default the
        agreement of the worst output: top-1 of scores, the cosine of other outputs.
    metric : callable, optional
        As for :func:`compare`: the larger, the better.
    validation : iterable, optional
        Batches to measure on. By default every fourth of `batches` is held back from calibration for this; of fewer
        than four, all serve both purposes.
    max_seconds : float
        No further way is tried after this time. The first one always is.
    progress : bool
        Show a bar on a terminal.
    **settings
        Of :func:`calibrate`.

    Returns
    -------
    Automatic
        ``quantized`` is the best function, ``verdict`` a sentence about it, ``rows()`` the table of all attempts, and
        ``next_steps`` says what to do next.

    Raises
    ------
    InvalidInputError
        As :func:`quantize`; for data that can be iterated only once, and an impossible target.

    Notes
    -----
    The function is calibrated once. The methods are the criteria (entropy, max, percentile, mse, auto), then zero
    points and bias correction, each on top of the best so far. Each is compiled and timed where JAX runs.
    :func:`tune` goes on from here: it leaves out the products that cost most.
    """
    end = time.perf_counter() + max_seconds
    check_limit(max_seconds)
    wanted, split = Target.parse(target), hold_back(batches, validation)
    tried = _Attempts(f, params, split, settings, metric)
    attempts, best, left_out = try_until(end, tried, wanted, tried.samples, metric, progress=progress)
    quantized = tried.make(best.recipe)
    warn_of_floats("layer", {name: why for name, why in quantized.skipped.items() if why != EXCLUDED})
    found = quantized.calibration
    data = Data(found.num_batches, tried.samples, split.calibration is not split.validation)
    size = num_bytes(params)
    return Automatic(quantized, found, attempts, best, wanted, tried.measure, data, size, left_out=left_out)


class _Attempts(Ways):
    """A function that can be quantized in several ways, and measured: a ``Quantizable``."""

    measure = ""
    """What the agreement is."""

    @property
    def samples(self) -> int:
        """Return the number of samples to measure on."""
        return count_samples(self.reference)

    def attempt(self, recipe: Recipe) -> Attempt:
        """Quantize the function and compare it with the float function."""
        quantized = self.make(recipe)
        runs = [self.runner(function) for function in (self.exact, quantized.function)]
        size = num_bytes(self.params)
        found = compare_models(
            (lambda feed: self.reference[feed[0]], lambda feed: runs[1](feed[1])),
            enumerate(self.split.validation),
            timed=[lambda feed: runs[0](feed[1]), lambda feed: runs[1](feed[1])],
            sizes=(size, size - quantized.bytes_saved),
            labels=None,
            metric=self.metric,
        )
        self.measure = kind_of_agreement(found.outputs) if self.metric is None else "metric"
        return Attempt.of(recipe, found, self.int8_share(quantized))
