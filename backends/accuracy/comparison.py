"""Compare the outputs of a float model with those of its quantized form."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

from ..html_tables import html_table
from ..text import milliseconds, number, without_nan
from .classes import Array
from .latency import interleaved_medians
from .outputs import COLUMNS, OutputComparison, Outputs, check_labels, compare_outputs
from .padding import unpadded

Metric: TypeAlias = Callable[[Sequence[Outputs], Sequence[Outputs]], float]
"""From the outputs of the float and of the quantized model, one mapping for each batch, to a number; 1 is perfect."""


class Comparison(NamedTuple):
    """A float model and its quantized form side by side, from ``compare``."""

    outputs: list[OutputComparison]
    metric: float
    """What the metric returned that was passed; NaN without one."""
    float_ms: float
    """Median time of the first batch."""
    int8_ms: float
    float_bytes: int
    """Size of the model's file, or of its parameters."""
    int8_bytes: int
    num_batches: int

    @property
    def sqnr_db(self) -> float:
        """Return the SQNR of the worst output."""
        return worst([output.sqnr_db for output in self.outputs])

    @property
    def agreement(self) -> float:
        """Return the agreement of the worst output: top-1 of scores, the cosine of others."""
        return worst([output.agreement for output in self.outputs])

    @property
    def time_ratio(self) -> float:
        """Return the time of the quantized model as a share of the float model's."""
        return self.int8_ms / self.float_ms

    def as_json(self) -> str:
        """Return everything as JSON, with null for NaN and infinity."""
        summary = {name: getattr(self, name) for name in ("sqnr_db", "agreement", "time_ratio")}
        return json.dumps(without_nan({**self._asdict(), **summary}), indent=2, allow_nan=False)

    def __str__(self) -> str:
        """Return the result in one line."""
        agreement = f"agreement {number(self.agreement, '.4f')}"
        metric = "" if math.isnan(self.metric) else f", metric {number(self.metric)}"
        return f"SQNR {number(self.sqnr_db, '.1f')} dB, {agreement}{metric}; {self.costs()}"

    def __repr__(self) -> str:
        """Return the result in one line."""
        return f"Comparison({self})"

    def costs(self) -> str:
        """Return time and size side by side."""
        sizes = f"{_megabytes(self.int8_bytes)} against {_megabytes(self.float_bytes)} MB"
        times = f"{milliseconds(self.int8_ms)} against {milliseconds(self.float_ms)} ms"
        return f"{times} (x {number(self.time_ratio, '.2f')}), {sizes}"

    def _repr_html_(self) -> str:
        """Return a table of the outputs for notebooks."""
        return html_table(str(self), COLUMNS, [output.cells() for output in self.outputs])


def kind_of_agreement(outputs: Iterable[OutputComparison]) -> str:
    """Return what the agreement of these outputs is: "top-1" or "cosine", and "agreement" if there are both kinds."""
    kinds = {"cosine" if math.isnan(one.top1) else "top-1" for one in outputs}
    return kinds.pop() if len(kinds) == 1 else "agreement"


def worst(values: Sequence[float]) -> float:
    """Return the least number; NaN only if all are."""
    return min((value for value in values if not math.isnan(value)), default=math.nan)


def score_outputs(
    feeds: Iterable[Any], reference: Sequence[Outputs], found: Sequence[Outputs], metric: Metric | None
) -> tuple[float, float]:
    """Return the SQNR of the worst output, and the metric: by default the agreement of the worst output."""
    triples = zip(feeds, reference, found, strict=True)
    pairs = ((unpadded(feed, exact), unpadded(feed, other)) for feed, exact, other in triples)
    outputs = compare_outputs(pairs, varying=metric is not None)
    agreement = worst([output.agreement for output in outputs])
    value = agreement if metric is None else float(metric(reference, found))
    return worst([one.sqnr_db for one in outputs]), value


def _megabytes(size: int) -> str:
    return number(size / 1e6, ".3g")


def compare_models(
    functions: tuple[Callable[[Any], Outputs], Callable[[Any], Outputs]],
    feeds: Iterable[Any],
    *,
    timed: Sequence[Callable[[Any], object]],
    sizes: tuple[int, int],
    labels: Array | None,
    metric: Metric | None,
) -> Comparison:
    """Return the comparison of two models.

    Parameters
    ----------
    functions : pair of callables
        From the data of a batch to the outputs of the float model, and of the other.
    feeds : iterable
        The data of each batch.
    timed : pair of callables
        What to time, in turns, on the first batch.
    sizes : pair of int
        In bytes.
    labels, metric
        Of the user.

    Returns
    -------
    Comparison

    Raises
    ------
    InvalidInputError
        As for :func:`compare_outputs`.
    """
    kept: list[tuple[Outputs, Outputs]] = []
    first: list[Any] = []
    num_batches = 0

    def pairs() -> Iterator[tuple[Outputs, Outputs]]:
        nonlocal num_batches
        for feed in feeds:
            first[:] = first or [feed]
            num_batches += 1
            pair = functions[0](feed), functions[1](feed)
            if metric is not None:
                kept.append(pair)
            yield unpadded(feed, pair[0]), unpadded(feed, pair[1])

    outputs = compare_outputs(pairs(), check_labels(labels), varying=metric is not None)
    float_ms, int8_ms = interleaved_medians([partial(run, first[0]) for run in timed])
    value = math.nan if metric is None else float(metric([a for a, _ in kept], [b for _, b in kept]))
    return Comparison(outputs, value, float_ms, int8_ms, *sizes, num_batches)
