import numpy as np
import pytest
import torch

import klquant
from klquant.backends.collection import HIGHEST, LOWEST, Statistics, growing_histogram, join, nothing
from klquant.backends.torch.observation import statistics as counting
from klquant.backends.torch.observation.statistics import (
    count,
    count_scaled,
    observe_growing,
    observe_histogram,
    observe_range,
)
from klquant.errors import InvalidInputError
from support.networks import batch

NUM_BINS = 301
GROWING = {"num_bins": NUM_BINS, "max_amax": 204800.0}
X = batch(4000, dtype=torch.float32)


def grown(*parts, name="fc"):
    """Return the statistics of one pass over these batches."""
    total = nothing()
    for part in parts:
        seen = nothing()
        observe_growing(seen, name, part, **GROWING)
        total = join(total, seen)
    return total


def as_data(statistics):
    return {**statistics._asdict(), "hist": {name: hist.tolist() for name, hist in statistics.hist.items()}}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("amax", [0.7, 3.0, 4.5])
def test_counts_are_those_of_the_core_also_as_a_device_makes_them(dtype, amax, monkeypatch):
    x = torch.cat([X, torch.tensor([amax, -amax, 0.0, -0.0, amax / NUM_BINS, -3 * amax / NUM_BINS])]).to(dtype)
    expected = klquant.histogram(x.to(torch.promote_types(dtype, torch.float32)).numpy(), num_bins=NUM_BINS, amax=amax)
    assert count(x, NUM_BINS, amax).tolist() == expected.hist.tolist()
    assert count_scaled(x, NUM_BINS, NUM_BINS / amax).tolist() == expected.hist.tolist()
    with monkeypatch.context() as patch:
        patch.setattr(counting, "_ON_DEVICE", ("cpu",))
        assert count_scaled(x, NUM_BINS, NUM_BINS / amax).tolist() == expected.hist.tolist()


@pytest.mark.parametrize("num_bins", [32767, 32769])
def test_a_device_counts_in_sixteen_bits_while_they_do(num_bins, monkeypatch):
    expected = klquant.histogram(X.numpy(), num_bins=num_bins, amax=2.5).hist
    monkeypatch.setattr(counting, "_ON_DEVICE", ("cpu",))
    assert count(X, num_bins, 2.5).tolist() == expected.tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_counts_on_a_gpu_are_those_on_the_cpu():
    assert count(X.cuda(), NUM_BINS, 2.5).tolist() == count(X, NUM_BINS, 2.5).tolist()


def test_joining_takes_maxima_and_sums():
    a = Statistics({"x": 1.0, "y": 2.0}, {"x": 1, "y": 3}, {"x": np.array([1, 2, 3])}, {})
    b = Statistics({"x": 4.0, "z": 0.0}, {"x": 2, "z": 1}, {"x": np.array([1, 0, 1]), "z": np.array([0, 7, 0])}, {})
    both = as_data(join(a, b))
    assert both["amax"] == {"x": 4.0, "y": 2.0, "z": 0.0}
    assert both["calls"] == {"x": 2, "y": 3, "z": 1}
    assert both["hist"] == {"x": [2, 2, 4], "z": [0, 7, 0]}
    assert as_data(join(b, a)) == both
    assert as_data(join(nothing(), a)) == as_data(a) == as_data(join(a, nothing()))


def test_calls_are_counted_within_a_batch():
    total = nothing()
    for calls in (2, 3, 1):
        seen = nothing()
        for _ in range(calls):
            observe_range(seen, "fc", X)
        total = join(total, seen)
    assert total.calls == {"fc": 3}


def test_int64_counts_add_up_beyond_what_float64_can_tell_apart():
    a = Statistics({}, {}, {"x": np.array([2**60, 1])}, {})
    assert join(a, a).hist["x"].tolist() == [2**61, 2]


SCALES = [3.0**k for k in (-8, -3, -1, 0, 2, 5)] + [0.1, 1.0, 7.25, 100.0, 1000.0]


@pytest.mark.parametrize("num_bins", [255, 301, 303, 4001, 8001])  # one more, two more than and multiples of three
@pytest.mark.parametrize("order", [1, -1])
def test_growing_ranges_give_the_same_counts_in_any_order(order, num_bins):
    options = {"num_bins": num_bins, "max_amax": 204800.0}
    parts = [X[k :: len(SCALES)] * scale for k, scale in enumerate(SCALES)][::order]
    edges = torch.tensor([(2 * k + 1) / 2 for k in range(20)])  # values on the edges of wide bins
    whole, total = nothing(), nothing()
    observe_growing(whole, "fc", torch.cat([*parts, edges]), **options)
    for part in [*parts, edges]:
        seen = nothing()
        observe_growing(seen, "fc", part, **options)
        total = join(total, seen)
    assert as_data(total) == as_data(whole)
    assert total.hist["fc"].sum() == len(X) + 20


def test_grown_counts_are_those_of_the_final_range():
    total = grown(X / 9, X, 100 * X)
    level = total.level["fc"]
    assert 3.0 ** (level - 1) <= 100 * X.abs().max() < 3.0**level
    direct = klquant.histogram(torch.cat([X / 9, X, 100 * X]).numpy(), num_bins=NUM_BINS, amax=3.0**level)
    assert total.hist["fc"].tolist() == direct.hist.tolist()


def test_the_range_is_cut_to_what_is_there_and_no_count_is_lost():
    total = grown(X)
    histogram = growing_histogram(total, "fc", 204800.0)
    amax, width = float(X.abs().max()), 2 * histogram.edges[-1] / len(histogram.hist)
    assert amax <= histogram.edges[-1] < amax + width
    assert len(histogram.hist) % 2 == 1
    assert NUM_BINS / 3 <= len(histogram.hist) <= NUM_BINS
    direct = klquant.histogram(X.numpy(), num_bins=len(histogram.hist), amax=float(histogram.edges[-1]))
    assert histogram.hist.tolist() == direct.hist.tolist()


def test_values_beyond_the_cap_are_counted_in_the_end_bins():
    total = nothing()
    observe_growing(total, "fc", torch.cat([X, torch.tensor([1e30, -1e30, -1e31])]), num_bins=NUM_BINS, max_amax=4.5)
    assert total.level["fc"] == 2
    histogram = growing_histogram(total, "fc", 4.5)
    assert histogram.hist.sum() == len(X) + 3
    width = 2 * 9 / NUM_BINS
    assert 4.5 <= histogram.edges[-1] < 4.5 + width
    assert histogram.hist[0] - (-4.5 + width > X).sum() >= 2
    assert histogram.hist[-1] >= 1


@pytest.mark.parametrize(("amax", "level"), [(1e-30, LOWEST), (3.0, 2), (2.999, 1), (1.0, 1), (1e30, HIGHEST)])
def test_levels_have_room_for_their_values(amax, level):
    total = nothing()
    observe_growing(total, "fc", torch.tensor([amax, -amax]), num_bins=NUM_BINS, max_amax=float("inf"))
    assert total.level == {"fc": level}
    assert total.hist["fc"].sum() == 2
    assert np.array_equal(total.hist["fc"], total.hist["fc"][::-1])


def test_a_tensor_of_zeros_is_not_counted():
    total = grown(torch.zeros(5))
    assert as_data(total) == {"amax": {"fc": 0.0}, "calls": {"fc": 1}, "hist": {}, "level": {}}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_every_observer(bad):
    x = torch.tensor([1.0, bad])
    for observe in (
        lambda: observe_range(nothing(), "fc", x),
        lambda: observe_growing(nothing(), "fc", x, **GROWING),
        lambda: observe_histogram(nothing(), "fc", x, amax={"fc": 1.0}, **GROWING),
    ):
        with pytest.raises(InvalidInputError, match="activations must be finite"):
            observe()
