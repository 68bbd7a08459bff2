"""Compare the outputs of two models, one batch at a time."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from klquant.errors import InvalidInputError

from ..text import number, percent
from .classes import Array, has_scores, top_classes
from .sums import Sums, compare_arrays

Outputs: TypeAlias = Mapping[str, Array]
"""The outputs of one batch by name."""
COLUMNS = ("output", "SQNR dB", "cosine", "top-1", "float accuracy", "int8 accuracy")


class OutputComparison(NamedTuple):
    """One output of a float model against that of its quantized form."""

    name: str
    sqnr_db: float
    cosine: float
    top1: float
    """Share of samples in which both have the same best class; NaN if the output does not look like scores."""
    float_accuracy: float = math.nan
    """Share of samples in which the best class is the label; NaN without labels."""
    int8_accuracy: float = math.nan

    @property
    def agreement(self) -> float:
        """Return the top-1 agreement of scores, and the cosine of other outputs."""
        return self.cosine if math.isnan(self.top1) else self.top1

    def cells(self) -> tuple[str, ...]:
        """Return the cells of a table with `COLUMNS`."""
        shares = (percent(value) for value in (self.top1, self.float_accuracy, self.int8_accuracy))
        return self.name, number(self.sqnr_db, ".1f"), number(self.cosine, ".4f"), *shares


class _Tally(NamedTuple):
    """Sums and counts of one output over the batches so far."""

    sums: Sums
    samples: int = 0
    same: int = 0
    float_hits: int = 0
    int8_hits: int = 0


def count_samples(arrays: Iterable[Mapping[str, Array]]) -> int:
    """Return the number of samples in the inputs or outputs of some batches."""
    return sum(max((len(one) if one.ndim else 1 for one in batch.values()), default=1) for batch in arrays)


def compare_outputs(
    pairs: Iterable[tuple[Outputs, Outputs]], labels: Array | None = None, *, varying: bool = False
) -> list[OutputComparison]:
    """Compare the floating point outputs of two models.

    Parameters
    ----------
    pairs : iterable
        The outputs of the float model and of the other, for each batch.
    labels : array, shape (samples,), integers, optional
        The true class of each sample, in the order of the batches.
    varying : bool
        Whether an output may have other shapes in both models, like a list of boxes. Then all its numbers are NaN.

    Returns
    -------
    list of OutputComparison

    Raises
    ------
    InvalidInputError
        For outputs of other names, of other shapes unless they may vary, no floating point output, no batches, and
        labels that do not fit.
    """
    tallies: dict[str, _Tally] = {}
    scored: set[str] = set()
    unknown: set[str] = set()
    rows = 0
    for k, (floats, others) in enumerate(pairs):
        expected = {name: array for name, array in floats.items() if array.dtype.kind == "f"}
        unknown |= _other_shapes(k, expected, others, varying)
        scored = {name for name, array in expected.items() if has_scores(array)} if not k else scored
        truth, rows = _truth(labels, expected, scored, rows)
        for name, array in expected.items():
            other = others[name]
            tally = tallies.setdefault(name, _Tally(Sums()))
            if name in unknown:
                continue
            tally = tally._replace(sums=tally.sums.plus(compare_arrays(array, other)))
            tallies[name] = _count(tally, array, other, truth) if name in scored else tally
    if not tallies:
        raise InvalidInputError("expected at least one batch with a floating point output, got none")
    if labels is not None and rows != len(labels):
        raise InvalidInputError(f"`labels` must have one label for each of {rows} samples, got {len(labels)}")
    return [
        OutputComparison(name, *[math.nan] * 3)
        if name in unknown
        else _described(name, tally, name in scored, labels is not None)
        for name, tally in tallies.items()
    ]


def check_labels(labels: Any) -> Array | None:
    """Return labels as an array; raise InvalidInputError for anything but one integer for each sample."""
    if labels is None:
        return None
    found = np.asarray(labels)
    if found.ndim != 1 or found.dtype.kind not in "iub" or not found.size:
        raise InvalidInputError(
            f"`labels` must be integers of shape (samples,), got {found.dtype} of shape {found.shape}"
        )
    return found.astype(np.int64)


def _other_shapes(batch: int, expected: Outputs, others: Outputs, varying: bool) -> set[str]:
    """Return the names of outputs with other shapes; raise InvalidInputError for them unless they may vary."""
    found = {name: others[name].shape if name in others else "none" for name in expected}
    different = [name for name, array in expected.items() if found[name] != array.shape]
    for name in different:
        if not varying or name not in others:
            raise InvalidInputError(
                f"batch {batch}: output `{name}` must have shape {expected[name].shape} in both models, got "
                f"{found[name]}; if it depends on the values, like a list of boxes, a metric can compare it"
            )
    return set(different)


def _truth(labels: Array | None, outputs: Outputs, scored: set[str], rows: int) -> tuple[Array | None, int]:
    """Return the labels of this batch and the number of samples up to it."""
    if labels is None:
        return None, rows
    lengths = {len(outputs[name]) for name in scored if outputs[name].ndim == 2}
    if len(lengths) != 1:
        raise InvalidInputError("`labels` need an output of shape (samples, classes), got none")
    length = lengths.pop()
    return labels[rows : rows + length], rows + length


def _count(tally: _Tally, array: Array, other: Array, truth: Array | None) -> _Tally:
    mine, its = top_classes(array), top_classes(other)
    hits = [0, 0]
    if truth is not None and array.ndim == 2 and len(truth) == len(mine):
        hits = [int((found == truth).sum()) for found in (mine, its)]
    return tally._replace(
        samples=tally.samples + mine.size,
        same=tally.same + int((mine == its).sum()),
        float_hits=tally.float_hits + hits[0],
        int8_hits=tally.int8_hits + hits[1],
    )


def _described(name: str, tally: _Tally, scored: bool, labelled: bool) -> OutputComparison:
    def share(count: int, known: bool) -> float:
        return count / tally.samples if known and tally.samples else math.nan

    broken = math.isnan(tally.sums.noise)  # NaN or infinity where the float model has numbers
    return OutputComparison(
        name,
        -math.inf if broken else tally.sums.sqnr_db,
        0.0 if broken else tally.sums.cosine,
        share(tally.same, scored),
        share(tally.float_hits, scored and labelled),
        share(tally.int8_hits, scored and labelled),
    )
