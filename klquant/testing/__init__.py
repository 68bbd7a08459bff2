"""Hypothesis strategies and oracles, for property tests of quantizers and calibrators.

- Strategies draw what breaks such code: :func:`histograms` draws a :class:`HistogramCase`, from :func:`counts` of the
  shapes :data:`COUNT_SHAPES` and :data:`WEIGHT_SHAPES` and :func:`edges`; then :func:`same_counts`,
  :func:`activations`, :func:`scales` and :func:`halfway_values`.
- Oracles say what is right. They are slow and plain, and share no code with the functions of klquant:
  :func:`nearest_levels` and, for the search, :mod:`klquant.reference`.
- Assertions take your function or its result: :func:`assert_nearest_levels`, :func:`assert_fake_quantizer`,
  :func:`assert_symmetric`, :func:`assert_monotone`, :func:`assert_idempotent`, :func:`assert_counts`,
  :func:`assert_monoid`, :func:`assert_merge_partition`, :func:`assert_merged` and :func:`assert_optimal`.

The property tests of klquant use them too. This package needs Hypothesis: ``pip install "klquant[testing]"``.
"""

from klquant.errors import MissingDependencyError

try:
    import hypothesis as _hypothesis  # noqa: F401
except ImportError as error:
    raise MissingDependencyError("klquant.testing needs Hypothesis: pip install 'klquant[testing]'") from error

from klquant.testing.cases import (
    COUNT_SHAPES,
    WEIGHT_SHAPES,
    HistogramCase,
    counts,
    edges,
    histograms,
    same_counts,
)
from klquant.testing.data import activations, halfway_values, scales
from klquant.testing.laws import (
    assert_fake_quantizer,
    assert_idempotent,
    assert_monoid,
    assert_monotone,
    assert_symmetric,
)
from klquant.testing.oracles import (
    assert_counts,
    assert_merge_partition,
    assert_merged,
    assert_nearest_levels,
    assert_optimal,
    nearest_levels,
)

__all__ = [
    "COUNT_SHAPES",
    "WEIGHT_SHAPES",
    "HistogramCase",
    "activations",
    "assert_counts",
    "assert_fake_quantizer",
    "assert_idempotent",
    "assert_merge_partition",
    "assert_merged",
    "assert_monoid",
    "assert_monotone",
    "assert_nearest_levels",
    "assert_optimal",
    "assert_symmetric",
    "counts",
    "edges",
    "halfway_values",
    "histograms",
    "nearest_levels",
    "same_counts",
    "scales",
]


def __dir__() -> list[str]:
    return __all__
