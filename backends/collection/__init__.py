"""One collector for every backend: the statistics of a pass over the data, and what drives the pass.

A backend supplies an :class:`ObservedModel`: a few pure functions of a batch. :func:`calibrate` makes a Calibration of
it, in two passes or one, in one process or several, and resumes where it was cut off. Its parts are functions, too:

- :func:`collect_ranges` and :func:`collect_counts` make two passes, :func:`collect_growing` makes one; each takes a
  :class:`Run`. :func:`capped` limits the ranges between the passes. :func:`resolve_outliers` repeats the second one
  over the :func:`narrower_ranges` of tensors in which an outlier hides the other values; :func:`collect_resolved` does
  both.
- They return :class:`Statistics`, which hold an :class:`Observation` of each tensor. :func:`join` adds up those of any
  parts of the data, and :func:`empty` is its neutral element, so any engine can map and reduce.
- :func:`histograms_of` and :func:`to_calibration` make the results.
- :class:`Kept` in a Run keeps tensors of the first pass in memory, within a number of bytes, so that the second one
  counts them without running the model.
- For backends: :func:`look` makes an :class:`Observation`, :func:`add_call` adds another call of the same batch, and
  :func:`count` counts a NumPy array into :class:`Bins` and returns it :class:`Counted`.
"""

from .bins import Bins, Counted, count
from .calibration import calibrate, to_calibration
from .kept import KeepingModel, Kept, KeptBatch
from .passes import (
    ObservedModel,
    Run,
    capped,
    collect_counts,
    collect_growing,
    collect_ranges,
    collect_resolved,
    resolve_outliers,
)
from .statistics import Observation, Statistics, add_call, empty, histograms_of, join, look, narrower_ranges

__all__ = [
    "Bins",
    "Counted",
    "KeepingModel",
    "Kept",
    "KeptBatch",
    "Observation",
    "ObservedModel",
    "Run",
    "Statistics",
    "add_call",
    "calibrate",
    "capped",
    "collect_counts",
    "collect_growing",
    "collect_ranges",
    "collect_resolved",
    "count",
    "empty",
    "histograms_of",
    "join",
    "look",
    "narrower_ranges",
    "resolve_outliers",
    "to_calibration",
]


def __dir__() -> list[str]:
    return __all__
