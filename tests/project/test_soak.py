"""Ten million batches: counts stay exact, and a count that would overflow int64 is an error."""

from itertools import accumulate, repeat

import numpy as np
import pytest

import klquant
from klquant import reference
from klquant.backends.collection import Bins, Observation, Statistics, add_call, collect_growing, join
from klquant.backends.settings import Settings
from klquant.errors import InvalidInputError
from support.arrays import ArrayModel
from support.namespaces import enable_x64

NUM_BATCHES = 10_000_000
NUM_BINS = 511


def repeated(value, times, add):
    """Return ``add(value, add(value, ...))`` with `times` values, by doubling: both sides of a sum are large."""
    doubled = list(accumulate(repeat(value, times.bit_length()), lambda a, _: add(a, a)))
    total, *others = (part for k, part in enumerate(doubled) if times >> k & 1)
    for part in others:
        total = add(total, part)
    return total


@pytest.fixture(scope="module")
def one_batch():
    return klquant.histogram(np.random.default_rng(0).laplace(size=100_000), num_bins=NUM_BINS, amax=8.0)


def test_ten_million_batches_are_ten_million_times_one(one_batch):
    total = repeated(one_batch, NUM_BATCHES, klquant.merge)
    assert total.hist.tolist() == [NUM_BATCHES * count for count in one_batch.hist.tolist()]
    found = klquant.optimal_threshold(*total)
    assert int(found.index) == int(np.argmin(reference.divergence_curve(total.hist)))


def test_batches_added_one_by_one_are_those_added_by_doubling(one_batch):
    total = one_batch
    for _ in range(9_999):
        total = klquant.merge(total, one_batch)
    assert total.hist.tolist() == repeated(one_batch, 10_000, klquant.merge).hist.tolist()


def test_statistics_of_ten_million_batches_are_exact_and_keep_their_range():
    settings = Settings(num_bins=NUM_BINS, passes=1)
    data = [{"x": np.linspace(-scale, scale, 1000, dtype=np.float32)} for scale in (0.5, 4.0, 1.0)]  # the range grows
    part = collect_growing(ArrayModel(), data, settings)
    total = repeated(part, NUM_BATCHES, join)
    (seen, before) = (total.tensors["x"], part.tensors["x"])
    assert seen.counts.tolist() == [NUM_BATCHES * count for count in before.counts.tolist()]
    sums = {"counts": None, "zeros": 0}
    assert seen._replace(**sums) == before._replace(**sums)
    assert seen.zeros == NUM_BATCHES * before.zeros
    assert total.num_batches == 3 * NUM_BATCHES


@pytest.mark.parametrize("library", ["numpy", "jax"])
def test_counts_near_two_to_the_62_are_searched_exactly(one_batch, library):
    hist = one_batch.hist * (2**62 // int(one_batch.hist.sum()))
    assert 2**61 < int(hist.sum()) <= 2**62
    curve = reference.divergence_curve(hist)
    arrays = (hist, one_batch.edges)
    if library == "jax":
        jax = pytest.importorskip("jax")
        with enable_x64():
            arrays = tuple(map(jax.numpy.asarray, arrays))
        with enable_x64():
            found = jax.jit(klquant.optimal_threshold)(*arrays)
    else:
        found = klquant.optimal_threshold(*arrays)
    assert int(found.index) == int(np.argmin(curve))
    assert float(found.divergence) == pytest.approx(curve.min(), abs=1e-12)


def test_what_int64_cannot_hold_is_refused(one_batch):
    half = klquant.Histogram(one_batch.hist * (2**62 // int(one_batch.hist.max())), one_batch.edges)
    with pytest.raises(InvalidInputError, match=r"below 2\*\*63"):
        klquant.merge(klquant.merge(half, half), half)
    with pytest.raises(InvalidInputError, match=r"below 2\*\*63"):
        klquant.optimal_threshold(half.hist * 2, half.edges)
    part = Statistics({"fc": Observation(-8.0, 8.0, 1, half.hist, Bins(NUM_BINS, 8.0))}, 1)
    with pytest.raises(InvalidInputError, match=r"below 2\*\*63"):
        join(join(part, part), part)


def test_calls_of_one_batch_that_would_pass_int64_are_refused():
    found = {"fc": Observation(0.0, 1.0, 1, np.full(3, 2**63 - 1), Bins(3, 1.0))}
    with pytest.raises(InvalidInputError, match=r"below 2\*\*63"):
        add_call(found, "fc", Observation(0.0, 1.0, 1, np.ones(3, np.int64), Bins(3, 1.0)))
