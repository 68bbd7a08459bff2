"""The statistics of a pass are a monoid: no split, order or association of the data changes them."""

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import klquant
from klquant.backends.collection import (
    collect_counts,
    collect_growing,
    collect_ranges,
    empty,
    histograms_of,
    join,
)
from klquant.backends.collection.bins import HIGHEST
from klquant.backends.settings import Settings
from support.arrays import ArrayModel, as_data

MODEL = ArrayModel(("x", "y"))
SETTINGS = Settings(num_bins=255)
VALUES = st.floats(-(2.0**40), 2.0**40, width=32) | st.sampled_from([0.0, 1.5, 3.0, 4.5, 9.0, 2.0**-20])
BATCHES = st.lists(
    st.dictionaries(st.sampled_from(["x", "y"]), hnp.arrays(np.float32, st.integers(0, 9), elements=VALUES)),
    min_size=1,
    max_size=6,
)


def collect(kind, batches, amax):
    if kind == "ranges":
        return collect_ranges(MODEL, batches)
    if kind == "counts":
        return collect_counts(MODEL, batches, amax, SETTINGS)
    return collect_growing(MODEL, batches, SETTINGS)


def amax_of(batches):
    return collect_ranges(MODEL, batches).amax


@pytest.mark.parametrize("kind", ["ranges", "counts", "growing"])
@given(batches=BATCHES, data=st.data())
def test_parts_in_any_order_and_association_join_to_the_whole(kind, batches, data):
    amax = amax_of(batches)
    whole = collect(kind, batches, amax)
    parts = data.draw(st.permutations([collect(kind, [batch], amax) for batch in batches]), "order")
    cut = data.draw(st.integers(0, len(parts)), "cut")
    left, right = (functools.reduce(join, some, empty()) for some in (parts[:cut], parts[cut:]))
    assert as_data(join(left, right)) == as_data(whole)
    assert as_data(join(right, left)) == as_data(whole)
    assert as_data(collect(kind, data.draw(st.permutations(batches), "batches"), amax)) == as_data(whole)


@given(batches=BATCHES)
def test_two_passes_count_what_the_core_counts_in_one_call(batches):
    amax = amax_of(batches)
    found = histograms_of(collect_counts(MODEL, batches, amax, SETTINGS))
    for name, largest in amax.items():
        values = np.concatenate([batch[name] for batch in batches if name in batch])
        assert largest == float(np.abs(values).max(initial=0.0))
        assert (name in found) == (largest > 0)
        if name in found:
            expected = klquant.histogram(values, num_bins=255, amax=largest)
            histogram, beyond = found[name]
            assert histogram.hist.tolist() == expected.hist.tolist()
            assert histogram.edges.tolist() == expected.edges.tolist()
            assert beyond == 0


@given(batches=BATCHES)
def test_one_pass_loses_no_value_and_keeps_bins_enough(batches):
    found = collect_growing(MODEL, batches, SETTINGS)
    for name, ((hist, edges), beyond) in histograms_of(found).items():
        values = np.concatenate([batch[name] for batch in batches if name in batch])
        assert found.tensors[name].zeros == (values == 0).sum()
        assert beyond == (np.abs(values) > 3.0**HIGHEST).sum()
        assert hist.sum() == sum(batch[name].size for batch in batches if name in batch)
        assert len(hist) % 2 == 1
        assert edges[-1] >= min(found.amax[name], 3.0**HIGHEST)
        if found.amax[name] >= 3.0**-9:  # below the lowest level bins are lost
            assert len(hist) >= SETTINGS.num_bins


@given(batches=BATCHES)
def test_ranges_are_those_of_all_values(batches):
    found = collect_ranges(MODEL, batches)
    for name, seen in found.tensors.items():
        values = np.concatenate([batch[name] for batch in batches if name in batch])
        with_zero = values if all(batch[name].size for batch in batches if name in batch) else np.append(values, 0)
        assert (seen.low, seen.high) == (with_zero.min(), with_zero.max())
    assert found.num_batches == len(batches)
