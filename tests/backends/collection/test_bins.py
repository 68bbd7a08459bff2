"""Counting on the host is that of ``klquant.histogram``, bit for bit."""

import numpy as np
import pytest

import klquant
from klquant.backends.collection import Bins, count
from klquant.backends.collection.bins import _CHUNK
from klquant.errors import InvalidInputError

NORMAL = np.random.default_rng(0).standard_normal(2 * _CHUNK + 17)
DATA = {
    "normal": NORMAL,
    "after a ReLU": np.maximum(NORMAL, 0),
    "on edges": np.arange(-604, 605) * (2.5 / 301) / 2,
    "zeros": np.zeros(1000),
    "signed zeros": np.array([-0.0, 0.0, 1e-30]),
    "none": np.zeros(0),
    "one": np.array([-2.5]),
    "huge": np.array([1e38, -1e38, 2.0]),
}


@pytest.mark.parametrize("num_bins", [3, 301, 4001])
@pytest.mark.parametrize("amax", [2.5, 1.0, 5.0, np.float32(2.3), 1e-30])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32"])
@pytest.mark.parametrize("name", DATA)
def test_counts_are_those_of_the_core(name, dtype, amax, num_bins):
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.nan_to_num(DATA[name], posinf=9, neginf=-9).clip(-1e30, 1e30).astype(dtype)
    values = np.where(np.isfinite(values), values, 9).astype(dtype)
    expected = klquant.histogram(values, num_bins=num_bins, amax=amax).hist
    found = count(values, Bins(num_bins, amax))
    assert found.counts.dtype == np.int64
    assert np.array_equal(found.counts, expected)
    assert found.zeros == np.count_nonzero(values == 0)


@pytest.mark.parametrize("place", [0, _CHUNK, -1])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad, place):
    values = NORMAL.copy()
    values[place] = bad
    with pytest.raises(InvalidInputError, match="must be finite, got 1 NaN or infinite values"):
        count(values, Bins(301, 2.0))


@pytest.mark.parametrize(
    ("bins", "message"), [(Bins(300, 1.0), "odd"), (Bins(301, 0.0), "amax"), (Bins(301, -1.0), "amax")]
)
def test_bins_that_cannot_be_are_refused(bins, message):
    with pytest.raises(InvalidInputError, match=message):
        count(NORMAL, bins)


def test_read_only_arrays_of_any_shape_are_counted_and_stay():
    values = NORMAL[:600].reshape(20, 30).T
    values.flags.writeable = False
    before = values.copy()
    expected = klquant.histogram(before, num_bins=301, amax=2.0).hist
    assert np.array_equal(count(values, Bins(301, 2.0)).counts, expected)
    assert np.array_equal(values, before)
