"""The presets against plain loops, and their laws."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from klquant import InfeasibleError, presets
from klquant.testing import counts
from strategies import even_edges

SHAPES = ["dense", "sparse", "few_samples", "heavy_tail"]
ABSOLUTE = {
    "slides": lambda hist, edges: presets.tensorrt_slides_threshold(hist, edges, num_quantized_bins=8),
    "modelopt": lambda hist, edges: presets.modelopt_threshold(hist, edges, num_bits=4, start_bin=8),
    "ncnn": lambda hist, edges: presets.ncnn_threshold(hist, edges, target_bins=8),
}


def counted(num_bins):
    return st.sampled_from(SHAPES).flatmap(lambda shape: counts(num_bins, shape=shape))


def kl(p, q):
    """Return the divergence, infinite where q lacks what p has, or where there is nothing."""
    total, mass = sum(p), sum(q)
    if not total or not mass or any(a > 0 >= b for a, b in zip(p, q, strict=True)):
        return math.inf
    return sum(a / total * math.log((a / total) / (b / mass)) for a, b in zip(p, q, strict=True) if a > 0)


def levelled(values, kept, counted_bins, group):
    """Spread the total of each group over its kept bins, divided by its number of counted ones."""
    result = []
    for k, keep in enumerate(kept):
        members = [j for j in range(len(values)) if group[j] == group[k]]
        number = sum(counted_bins[j] for j in members)
        result.append(sum(values[j] for j in members) / number if keep and number else 0.0)
    return result


def slides_curve(hist, levels):
    curve = []
    for m in range(levels, len(hist)):
        p = [*hist[: m - 1], hist[m - 1] + sum(hist[m:])]
        kept = [value != 0 for value in p]
        curve.append(kl(p, levelled(hist[:m], kept, kept, [k * levels // m for k in range(m)])))
    return curve


def smoothed(values):
    zeros = sum(v == 0 for v in values)
    if zeros == len(values) or 1e-4 * zeros / (len(values) - zeros) >= 1:
        return None
    loss = 1e-4 * zeros / (len(values) - zeros)
    return [1e-4 if v == 0 else v - loss for v in values]


def mxnet_curve(hist, levels):
    curve, centre = [], len(hist) // 2
    for half in range(levels // 2, centre + 1):
        start, stop = centre - half, centre + half + 1
        p = list(hist[start:stop])
        p[0] += sum(hist[:start])
        p[-1] += sum(hist[stop:])
        sliced = [0, *hist[start + 1 : stop]]
        group = [min(k // (len(p) // levels), levels - 1) for k in range(len(p))]
        q = levelled(sliced, [v != 0 for v in p], [v != 0 for v in sliced], group)
        p, q = smoothed(p), smoothed(q)
        curve.append(math.inf if p is None or q is None else kl(p, q))
    return curve


def found_by(function, *arguments, **options):
    try:
        return function(*arguments, **options)
    except InfeasibleError:
        return None


def assert_found(found, curve, values):
    if found is None:
        assert np.isinf(curve).all()
        return
    index = int(found.index)
    assert curve[index] <= min(curve) + 1e-12
    assert not any(value < min(curve) - 1e-12 for value in curve[:index])
    assert float(found.divergence) == pytest.approx(curve[index], abs=1e-12)
    assert float(found) == pytest.approx(values[index], rel=1e-15)


@given(counted(21))
def test_the_slides_are_their_loops(hist):
    edges, curve = np.arange(22) * 0.25, slides_curve(hist.tolist(), 4)
    found = found_by(presets.tensorrt_slides_threshold, hist, edges, num_quantized_bins=4)
    assert_found(found, curve, [(m + 0.5) * 0.25 for m in range(4, 21)])


@given(counted(21))
def test_mxnet_is_its_loops(hist):
    edges, curve = even_edges(21, 5.25), mxnet_curve(hist.tolist(), 5)
    assert_found(found_by(presets.mxnet_threshold, hist, edges, num_quantized_bins=5), curve, edges[13:])


@pytest.mark.parametrize("preset", ABSOLUTE.values(), ids=ABSOLUTE)
@given(hist=counted(33), exponent=st.integers(-30, 30))
def test_powers_of_two_scale_the_threshold(preset, hist, exponent):
    edges = np.arange(34) / 8
    found, scaled = (found_by(preset, hist, e) for e in (edges, edges * 2.0**exponent))
    assert (found is None) == (scaled is None)
    if found is not None:
        assert float(scaled) == float(found) * 2.0**exponent
        assert scaled.index == found.index
        np.testing.assert_array_equal(scaled.divergence, found.divergence)


@pytest.mark.parametrize("preset", ABSOLUTE.values(), ids=ABSOLUTE)
@given(hist=counted(33))
def test_the_threshold_belongs_to_the_index(preset, hist):
    found = found_by(preset, hist, np.arange(34) / 8)
    if found is not None:
        half = 0.0 if preset is ABSOLUTE["modelopt"] else 0.5
        assert float(found) == (8 + int(found.index) + half) / 8
        assert not float(found.divergence) < -1e-12
        assert 8 <= 8 + int(found.index) <= 33


@given(counted(33), st.integers(0, 10**6))
def test_modelopt_does_not_see_the_first_bin(hist, zeros):
    edges, other = np.arange(34) / 8, np.append(zeros, hist[1:])
    found, same = (found_by(ABSOLUTE["modelopt"], h, edges) for h in (hist, other))
    assert (found is None) == (same is None)
    assert found is None or (found.index, float(found)) == (same.index, float(same))


@given(counted(33), st.integers(2, 5))
def test_strides_look_at_a_part_of_the_candidates(hist, stride):
    edges = np.arange(34) / 8
    found = found_by(presets.modelopt_threshold, hist, edges, num_bits=4, start_bin=8, stride=stride)
    if found is not None:
        assert float(found) == edges[8 + stride * int(found.index)]


@given(st.integers(1, 7), st.integers(1, 1000))
def test_of_equal_minima_modelopt_takes_the_last_and_the_others_the_first(where, count):
    hist = np.where(np.arange(33) == where, count, 0)
    found = {name: int(preset(hist, np.arange(34) / 8).index) for name, preset in ABSOLUTE.items() if name != "ncnn"}
    assert found == {"slides": 0, "modelopt": 25}
