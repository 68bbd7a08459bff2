"""Rewrite a float model for the INT8 kernels of onnxruntime, with the thresholds of its tensors."""

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import klquant

from ...ranges import Candidate, Range
from ..model.operators import is_excluded
from ..model.preparation import Prepared
from ..qdq.plan import Plan
from ..qdq.rules import make_plan
from .hard_swish import cut_ranges
from .padding import pad_channels
from .rewrite import Rewritten, rewrite
from .scalars import fold_scalars


class Lowered(NamedTuple):
    """A model for which onnxruntime has INT8 kernels, and what was known of the one that it was made from."""

    prepared: Prepared
    thresholds: dict[str, float]
    candidates: dict[str, Candidate]
    plan: Plan
    factors: dict[str, float]
    """By what the values of a tensor are multiplied, by name."""


def lower(
    prepared: Prepared,
    thresholds: Mapping[str, float],
    candidates: Mapping[str, Candidate],
    excluded: tuple[str, ...],
) -> Lowered:
    """Rewrite a model where that lets more of it run in INT8."""
    spared = {node.name for node in prepared.graph.nodes if is_excluded(prepared.graph, node, excluded)}
    padded = pad_channels(prepared, spared)
    while True:
        found = rewrite(fold_scalars(padded, spared), spared)
        ranges = {held: _scaled(candidates[name], factor) for held, name, factor in _sources(found, candidates)}
        ranges = cut_ranges(found.prepared.graph, ranges)
        known = _thresholds(found, thresholds, ranges)
        plan = make_plan(found.prepared.graph, known, "onnxruntime", excluded, products=found.products)
        useless = {name for name, tensors in found.nodes.items() if not plan.readers.keys() >= set(tensors)}
        useless |= found.returned
        if not useless:
            break
        spared |= useless
    factors = {name: factor for held, names in found.origins.items() for name, factor in names if name == held}
    return Lowered(found.prepared, known, ranges, plan, factors)


def _thresholds(
    found: Rewritten, thresholds: Mapping[str, float], candidates: Mapping[str, Candidate]
) -> dict[str, float]:
    """Return T of the tensors of the rewritten model."""
    known = {held: thresholds[name] * factor for held, name, factor in _sources(found, thresholds)} | found.fixed
    for name, (source, slope) in found.slopes.items():
        if source in known:
            one = candidates.get(source)
            known[name] = slope * (known[source] if one is None or one.range.low == 0 else -one.range.low)
    return known


def _sources(found: Rewritten, known: Collection[str]) -> Iterator[tuple[str, str, float]]:
    """Yield each tensor, a known tensor that it holds, if possible that of the same name, and the factor."""
    for held, names in found.origins.items():
        first = next((one for one in sorted(names, key=lambda one: one[0] != held) if one[0] in known), None)
        if first is not None:
            yield held, *first


def _scaled(one: Candidate, factor: float) -> Candidate:
    if factor == 1:
        return one
    low, high = one.range
    return Candidate(
        Range(low * factor, high * factor), klquant.Histogram(one.histogram.hist, one.histogram.edges * factor)
    )
