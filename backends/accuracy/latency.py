"""The time of several functions, measured by turns so that a busy machine slows all of them alike."""

import statistics
import time
from collections.abc import Callable, Sequence


def interleaved_medians(
    functions: Sequence[Callable[[], object]], *, seconds: float = 1.0, least: int = 5, most: int = 101
) -> list[float]:
    """Return the median time of each function in ms, after one call that is not counted.

    There are `least` to `most` rounds of one call each, and no new round after `seconds`.
    """
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    begin = time.perf_counter()
    for round_number in range(most):
        if round_number >= least and time.perf_counter() - begin > seconds:
            break
        for function, found in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            found.append(1000 * (time.perf_counter() - start))
    return [statistics.median(found) for found in times]
