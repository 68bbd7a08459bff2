"""Each preset against its original, transcribed into plain loops that share no code with the preset."""

import contextlib
from bisect import bisect_right
from math import ceil, floor, inf, isinf, isnan, log, nan

import numpy as np
import pytest

from klquant import ArrayTypeError, InfeasibleError, InvalidInputError, presets
from support.namespaces import JAX, import_torch, needs_jax

EPS = 0.0001


# --- the originals, one candidate at a time -------------------------------------------------------------------------


def smoothed(values):
    zeros = sum(1 for v in values if v == 0)
    others = len(values) - zeros
    if others == 0 or EPS * zeros / others >= 1:
        return None
    result = [EPS if v == 0 else v - EPS * zeros / others for v in values]
    return result if min(result) > 0 else None


def entropy(p, q):
    p_sum, q_sum, result = sum(p), sum(q), 0.0
    for x, y in zip(p, q, strict=True):
        if x > 0:
            if y == 0:
                return inf
            result += x / p_sum * log((x / p_sum) / (y / q_sum))
    return result


def mxnet(hist, half, levels):
    zero_bin = len(hist) // 2
    first, last = zero_bin - half, zero_bin + half
    p, sliced = [0] * (2 * half + 1), [0] * (2 * half + 1)
    for j, count in enumerate(hist):
        if j <= first:
            p[0] += count
        elif j > last:
            p[-1] += count
        else:
            p[j - first] += count
            sliced[j - first] = count
    merged = len(p) // levels
    q = [0.0] * len(p)
    for j in range(levels):
        bins = range(j * merged, len(p) if j == levels - 1 else (j + 1) * merged)
        norm = sum(1 for k in bins if sliced[k] != 0)
        total = sum(sliced[k] for k in bins)
        for k in bins:
            if norm and p[k] != 0:
                q[k] = total / norm
    p, q = smoothed(p), smoothed(q)
    return inf if p is None or q is None else entropy(p, q)


def into_levels(counts, occupied, levels):
    borders = [j * len(counts) / levels for j in range(levels)]
    totals, numbers = [0] * levels, [0] * levels
    level = [bisect_right(borders, k) - 1 for k in range(len(counts))]
    for k, count in enumerate(counts):
        if occupied[k]:
            totals[level[k]] += count
            numbers[level[k]] += 1
    return [totals[level[k]] / numbers[level[k]] if occupied[k] else 0.0 for k in range(len(counts))]


def slides(hist, m, levels):
    p = list(hist[:m])
    p[m - 1] += sum(hist[m:])
    q = into_levels(hist[:m], [count != 0 for count in p], levels)
    return entropy(p, q) if sum(q) > 0 else inf


def modelopt(hist, i, levels):
    bins = [hist[1], *hist[1:]]
    p = list(bins[:i])
    p[-1] += sum(bins[i:])
    q = into_levels(bins[:i], [count != 0 for count in bins[:i]], levels)
    return entropy(p, q) if sum(q) > 0 else nan


def ncnn(hist, threshold, levels):
    total = sum(hist)
    normed = [count / total for count in hist[:threshold]]
    clip = [EPS + share for share in normed]
    clip[-1] += sum(hist[threshold:]) / total
    expand = [EPS] * threshold
    for j in range(levels):
        start, end = j * threshold / levels, (j + 1) * threshold / levels
        parts = [(k, min(k + 1, end) - max(k, start)) for k in range(floor(start), ceil(end))]
        density = sum(part * normed[k] for k, part in parts) / (end - start)
        for k, part in parts:
            expand[k] += part * density
    return sum(a * log(a / b) for a, b in zip(clip, expand, strict=True))


class Original:
    """One original search: its candidates, their divergences and thresholds, and its choice between equals."""

    def __init__(self, name, bins, levels, step=1):
        self.name, self.bins, self.levels = name, bins, levels
        self.divergence = {"mxnet": mxnet, "slides": slides, "modelopt": modelopt, "ncnn": ncnn}[name]
        self.candidates = {
            "mxnet": range(levels // 2, bins // 2 + 1),
            "slides": range(levels, bins),
            "modelopt": range(levels, bins + 1, step),
            "ncnn": range(levels, bins),
        }[name]
        self.step = step

    def histogram(self, values):
        low = -np.abs(values).max() if self.name == "mxnet" else 0.0
        shown = values if self.name == "mxnet" else np.abs(values)
        return np.histogram(shown, bins=self.bins, range=(low, np.abs(values).max()))

    def find(self, hist, edges):
        if self.name == "mxnet":
            return presets.mxnet_threshold(hist, edges, num_quantized_bins=self.levels)
        if self.name == "slides":
            return presets.tensorrt_slides_threshold(hist, edges, num_quantized_bins=self.levels)
        if self.name == "ncnn":
            return presets.ncnn_threshold(hist, edges, target_bins=self.levels)
        bits = self.levels.bit_length()  # 2 ** (bits - 1) levels
        return presets.modelopt_threshold(hist, edges, num_bits=bits, stride=self.step, start_bin=self.levels)

    def curve(self, hist, candidates):
        counts = hist.tolist()
        return [self.divergence(counts, candidate, self.levels) for candidate in candidates]

    def value(self, edges, candidate):
        if self.name == "mxnet":
            return edges[self.bins // 2 + 1 + candidate]
        return edges[candidate] if self.name == "modelopt" else (candidate + 0.5) * (edges[-1] / self.bins)

    def best(self, curve):
        if self.name != "modelopt":
            return min(range(len(curve)), key=lambda k: curve[k])
        undefined = [k for k, d in enumerate(curve) if isnan(d)]  # np.argmin takes NaN for the minimum
        least = min(curve)
        return undefined[-1] if undefined else max(k for k, d in enumerate(curve) if d == least)


def agree(original, hist, edges):
    curve = original.curve(hist, original.candidates)
    expected = original.best(curve)
    if isinf(curve[expected]):
        with pytest.raises(InfeasibleError, match="`hist` must have a feasible candidate, got none among"):
            original.find(hist, edges)
        return
    found = original.find(hist, edges)
    index = int(found.index)
    assert index == expected or 0 <= curve[index] - curve[expected] <= 1e-12
    assert float(found) == pytest.approx(original.value(edges, original.candidates[index]), rel=1e-15)
    assert float(found.divergence) == pytest.approx(curve[index], rel=0, abs=1e-12, nan_ok=True)


# --- histograms ------------------------------------------------------------------------------------------------------


def gaussian(rng, size):
    return rng.normal(size=size)


def laplace(rng, size):
    return rng.laplace(size=size)


def relu(rng, size):
    return np.maximum(rng.normal(0.2, 1, size=size), 0)


def heavy_tail(rng, size):
    return np.clip(rng.standard_t(1.5, size=size), -300, 300)


def sparse(rng, size):
    return rng.choice([0.01, -0.3, 0.5, -1.7, 2.5, 2.6, 4.0], p=[0.4, 0.3, 0.1, 0.1, 0.05, 0.049, 0.001], size=size)


def few_samples(rng, size):
    return rng.laplace(size=max(5, size // 2000))


def at_the_end(rng, size):
    return np.append(rng.choice([-1.0, 1.0], size=size), [0.2, -0.3])


def two_lumps(rng, size):
    return rng.choice([-1, 1], size=size) * rng.normal(5, 0.3, size=size)


SHAPES = [gaussian, laplace, relu, heavy_tail, sparse, few_samples, at_the_end, two_lumps]
SMALL = [
    *(Original("mxnet", bins, levels) for bins, levels in [(9, 3), (31, 7), (101, 15), (151, 31), (41, 41)]),
    *(Original("slides", bins, levels) for bins, levels in [(9, 2), (31, 7), (100, 16), (150, 32), (41, 40), (2, 1)]),
    *(Original("modelopt", bins, levels) for bins, levels in [(9, 2), (31, 8), (100, 16), (150, 32), (32, 32)]),
    *(Original("modelopt", 200, 16, step=step) for step in (7, 400)),
    *(Original("ncnn", bins, levels) for bins, levels in [(9, 2), (31, 7), (100, 16), (150, 32), (41, 40), (2, 1)]),
]
MIDDLE = [Original("mxnet", 401, 255), *(Original(name, 350, 128) for name in ("slides", "modelopt", "ncnn"))]
REAL = [Original("mxnet", 2001, 255), *(Original(name, 2048, 128) for name in ("slides", "modelopt", "ncnn"))]
FULL = [
    Original("mxnet", 2001, 255),
    Original("slides", 1024, 128),
    Original("modelopt", 2048, 128, step=4),
    Original("ncnn", 1024, 128),
]


def name_of(case):
    return case.__name__ if callable(case) else f"{case.name}-{case.bins}-{case.levels}-{case.step}"


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("original", SMALL, ids=name_of)
@pytest.mark.parametrize("size", [20, 100_000])
def test_small_histograms(original, shape, size):
    agree(original, *original.histogram(shape(np.random.default_rng(size), size)))


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("original", MIDDLE, ids=name_of)
def test_all_levels(original, shape):
    agree(original, *original.histogram(shape(np.random.default_rng(1), 200_000)))


@pytest.mark.parametrize("original", FULL, ids=name_of)
def test_realistic_histograms_in_full(original):
    agree(original, *original.histogram(laplace(np.random.default_rng(2), 200_000)))


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("original", REAL, ids=name_of)
def test_realistic_histograms_at_some_candidates(original, shape):
    hist, edges = original.histogram(shape(np.random.default_rng(3), 200_000))
    found = original.find(hist, edges)
    candidate = original.candidates[int(found.index)]
    assert float(found) == pytest.approx(original.value(edges, candidate), rel=1e-15)
    (divergence,) = original.curve(hist, [candidate])
    assert float(found.divergence) == pytest.approx(divergence, rel=0, abs=1e-12, nan_ok=True)
    some = {*range(candidate - 3, candidate + 4), *original.candidates[::100]} & set(original.candidates)
    assert not any(other < divergence - 1e-12 for other in original.curve(hist, some))


@pytest.mark.parametrize("original", SMALL, ids=name_of)
def test_random_counts_with_holes(original):
    rng = np.random.default_rng(4)
    for share in (0.2, 0.5, 0.9):
        hist = rng.integers(1, 30, size=original.bins) * (rng.random(original.bins) < share)
        hist[1] = 9
        agree(original, hist, original.histogram(np.ones(1))[1])


# --- quirks of each preset -----------------------------------------------------------------------------------------


def absolute_edges(bins):
    return np.linspace(0, bins, bins + 1)


def test_the_example_on_the_slides():
    hist = np.array([1, 0, 2, 3, 5, 3, 1, 7, 0])
    p, q = [1, 2, 3, 5, 3, 1, 7], [2, 2, 2, 4, 4, 4, 4]
    assert slides(hist.tolist(), 8, 2) == pytest.approx(sum(x / 22 * log(x / y) for x, y in zip(p, q, strict=True)))
    agree(Original("slides", 9, 2), hist, absolute_edges(9))


def test_the_whole_range_is_no_candidate_of_slides_and_ncnn():
    hist = np.zeros(200, dtype=int)
    hist[::2] = 5
    for find in (presets.tensorrt_slides_threshold, presets.ncnn_threshold):
        assert float(find(hist, absolute_edges(200))) < 200
    hist[:] = 0
    hist[-1] = 5
    with pytest.raises(InfeasibleError, match="got none among 72"):
        presets.tensorrt_slides_threshold(hist, absolute_edges(200))
    assert int(presets.ncnn_threshold(hist, absolute_edges(200)).index) == 0


def test_mxnet_drops_the_first_bin_from_q_only():
    # half-width 1: P = [4, 2, 3], S = [0, 2, 3]; half-width 2: P = [3, 1, 2, 2, 1], S = [0, 1, 2, 2, 1] in groups
    # {0} {1} {2, 3, 4}, so Q = [0, 1, 5/3, 5/3, 5/3]
    hist, edges = np.array([3, 1, 2, 2, 1]), np.linspace(-5, 5, 6)
    narrow = entropy([4, 2, 3], [EPS, 2 - EPS / 2, 3 - EPS / 2])
    wide = entropy([3, 1, 2, 2, 1], [EPS, 1 - EPS / 4, *[5 / 3 - EPS / 4] * 3])
    found = presets.mxnet_threshold(hist, edges, num_quantized_bins=3)
    assert float(found.divergence) == pytest.approx(min(narrow, wide), rel=1e-13)
    assert float(found) == [3.0, 5.0][int(wide < narrow)]


def test_mxnet_does_not_count_bins_that_hold_outliers_only():
    # one group of 5 bins at half-width 2 of 3: the first and the last of P hold outliers, S only has 6 in the middle
    hist, edges = np.array([4, 0, 0, 6, 0, 0, 2]), np.linspace(-7, 7, 8)
    curve = Original("mxnet", 7, 3).curve(hist, [1, 2, 3])
    assert curve[0] == pytest.approx(entropy([4, 6, 2], [EPS, 6 - 2 * EPS, EPS]), rel=1e-3)
    agree(Original("mxnet", 7, 3), hist, edges)


def test_mxnet_threshold_has_a_floor():
    hist = np.zeros(2001, dtype=int)
    hist[1000] = 10**6
    hist[[0, 2000]] = 1
    hist[900:1101] += 3
    found = presets.mxnet_threshold(hist, np.linspace(-2001, 2001, 2002))
    assert float(found) >= 255


def test_modelopt_takes_the_last_of_equal_minima_and_slides_the_first():
    hist = np.zeros(64, dtype=int)
    hist[[3, 10]] = 5  # two bins, each alone in its level: D = 0 for every window that ends beyond them
    edges = absolute_edges(64)
    assert float(presets.modelopt_threshold(hist, edges, num_bits=4, start_bin=8)) == 64
    assert float(presets.tensorrt_slides_threshold(hist, edges, num_quantized_bins=8)) == 11.5


def test_modelopt_ignores_the_first_bin():
    hist, edges = Original("modelopt", 300, 128).histogram(laplace(np.random.default_rng(5), 10_000))
    zeros = hist.copy()
    zeros[0] = 10**6
    assert presets.modelopt_threshold(hist, edges) == presets.modelopt_threshold(zeros, edges)
    with pytest.raises(InfeasibleError):
        presets.modelopt_threshold(np.eye(1, 300, dtype=int)[0], edges)


def test_modelopt_prefers_the_widest_empty_window():
    hist = np.zeros(300, dtype=int)
    hist[200:] = 7
    found = presets.modelopt_threshold(hist, absolute_edges(300))
    assert (float(found), int(found.index)) == (200.0, 72)
    assert np.isnan(found.divergence)


@pytest.mark.parametrize(
    ("bits", "unsigned", "levels"), [(4, False, 8), (4, True, 16), (1, False, 1), (16, True, 65536)]
)
def test_modelopt_levels(bits, unsigned, levels):
    hist, edges = Original("modelopt", 60, 1).histogram(laplace(np.random.default_rng(6), 2000))
    found = presets.modelopt_threshold(hist, edges, num_bits=bits, unsigned=unsigned, start_bin=5, stride=3)
    curve = [modelopt(hist.tolist(), i, levels) for i in range(5, 61, 3)]
    assert float(found.divergence) == pytest.approx(min(curve), rel=0, abs=1e-12)
    assert float(found) == edges[5 + 3 * int(found.index)]


# --- results, inputs, errors ----------------------------------------------------------------------------------------

PRESETS = [
    presets.mxnet_threshold,
    presets.tensorrt_slides_threshold,
    presets.modelopt_threshold,
    presets.ncnn_threshold,
]
every_preset = pytest.mark.parametrize("find", PRESETS, ids=lambda find: find.__name__)
every_absolute = pytest.mark.parametrize("find", PRESETS[1:], ids=lambda find: find.__name__)


def valid(find, bins=301):
    name = "mxnet" if find is presets.mxnet_threshold else "slides"
    return Original(name, bins, 3).histogram(laplace(np.random.default_rng(7), 5000))


@every_preset
@pytest.mark.parametrize("hist_dtype", [np.int32, np.uint16, np.uint64, np.float32, np.float64])
@pytest.mark.parametrize("edges_dtype", [np.float32, np.float64])
def test_dtypes(find, hist_dtype, edges_dtype):
    hist, edges = valid(find)
    found = find(hist.astype(hist_dtype), edges.astype(edges_dtype))
    assert isinstance(found, presets.PresetThreshold)
    assert (found.value.dtype, found.index.dtype, found.divergence.dtype) == (edges_dtype, np.int32, np.float64)
    assert int(found.index) == int(find(hist, edges).index)
    assert float(found) == pytest.approx(float(find(hist, edges)), rel=1e-6)


@every_preset
def test_integer_edges(find):
    hist, _ = valid(find)
    edges = np.arange(302) if find is not presets.mxnet_threshold else np.arange(-301, 302, 2)
    found = find(hist, edges)
    assert found.value.dtype == np.float64
    assert found == find(hist, edges.astype(np.float64))


@every_preset
def test_inputs_stay_as_they_are(find):
    hist, edges = valid(find)
    before = hist.copy(), edges.copy()
    find(hist, edges)
    assert (hist == before[0]).all()
    assert (edges == before[1]).all()
    hist.flags.writeable = edges.flags.writeable = False
    find(hist, edges)


@every_preset
def test_scaling(find):
    hist, edges = valid(find)
    assert float(find(hist, edges * 8)) == 8 * float(find(hist, edges))
    if find is not presets.mxnet_threshold:  # it smooths counts, not shares
        assert find(hist * 4, edges).index == find(hist / 2**20, edges).index == find(hist, edges).index


@every_preset
def test_an_empty_histogram(find):
    hist, edges = valid(find)
    with pytest.raises(InfeasibleError, match="`hist` must have a feasible candidate, got none among"):
        find(np.zeros_like(hist), edges)


@every_preset
def test_only_numpy_arrays(find):
    hist, edges = valid(find)
    for arrays in ((hist.tolist(), edges), (hist, edges.tolist())):
        with pytest.raises(ArrayTypeError, match=r"must be a NumPy array, got list; convert it with np.asarray"):
            find(*arrays)
    with pytest.raises(ArrayTypeError, match="`hist` must hold real numbers"):
        find(hist.astype(complex), edges)
    with pytest.raises(ArrayTypeError, match="`edges` must hold real numbers"):
        find(hist, edges.astype(str))


@every_preset
@needs_jax
def test_jax_arrays_are_refused(find):
    hist, edges = valid(find)
    for arrays, name in (((JAX.asarray(hist), edges), "hist"), ((hist, JAX.asarray(edges)), "edges")):
        with pytest.raises(ArrayTypeError, match=rf"`{name}` must be a NumPy array, got jax.*np.asarray"):
            find(*arrays)


@every_preset
def test_torch_tensors_are_refused(find):
    torch = import_torch()
    hist, edges = valid(find)
    with pytest.raises(ArrayTypeError, match=r"`hist` must be a NumPy array, got torch.Tensor"):
        find(torch.from_numpy(hist), edges)


@every_preset
@pytest.mark.parametrize(
    ("wrong", "message"), [(nan, "finite, got nan at index 3"), (-2, "negative, got -2.0 at index 3")]
)
def test_counts(find, wrong, message):
    hist, edges = valid(find)
    hist = hist.astype(np.float64)
    hist[3] = wrong
    with pytest.raises(InvalidInputError, match=message):
        find(hist, edges)


@every_preset
def test_shapes(find):
    hist, edges = valid(find)
    for wrong in (edges[:-1], edges[:, None]):
        with pytest.raises(InvalidInputError, match=r"`edges` must have shape \(302,\), one more than `hist`, got"):
            find(hist, wrong)
    with pytest.raises(InvalidInputError, match="one-dimensional"):
        find(hist[:, None], edges)


def change(edges, where, value):
    edges[where] = value
    return edges


@every_absolute
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda edges: edges + 1, r"must start at 0, for a histogram of absolute values, got 1\.0"),
        (lambda edges: edges - 150, r"must start at 0, for a histogram of absolute values, got -150\.0"),
        (lambda edges: -edges, "strictly increasing, got -?0.0, -"),
        (lambda edges: change(edges / edges[1], 5, 4.0), r"strictly increasing, got 4\.0, 4\.0 at index 4"),
        (lambda edges: change(edges, -1, inf), "must be finite and strictly increasing"),
        (lambda edges: change(edges, 5, nan), "must be finite and strictly increasing"),
        (lambda edges: edges**2, "must be equally spaced"),
    ],
)
def test_edges_of_absolute_histograms(find, wrong, message):
    hist, edges = valid(find)
    with pytest.raises(InvalidInputError, match=message), np.errstate(invalid="ignore"):
        find(hist, wrong(edges))


@every_absolute
@pytest.mark.parametrize(("dtype", "more", "accepted"), [("f4", 0, True), ("f4", 0.03, False), ("i8", 1, False)])
def test_how_far_the_widths_may_differ(find, dtype, more, accepted):
    hist, edges = valid(find)
    edges = (np.arange(len(edges)) * (3.3 if dtype == "f4" else 50)).astype(dtype)
    edges[-1] += (edges[1] * more).astype(dtype) if dtype == "f4" else more
    with contextlib.nullcontext() if accepted else pytest.raises(InvalidInputError, match="must be equally spaced"):
        find(hist, edges)


def test_bins_so_narrow_that_float32_rounds_their_widths():
    edges = np.linspace(0, 1, 500_002, dtype=np.float32)
    widths = np.diff(edges.astype(np.float64))
    assert np.ptp(widths) > 0.02 * widths.mean()
    found = presets.modelopt_threshold(np.ones(500_001, np.int64), edges, stride=400_000)
    assert float(found) in edges


def test_symmetric_histograms():
    hist, edges = valid(presets.mxnet_threshold)
    with pytest.raises(InvalidInputError, match="symmetric about 0"):
        presets.mxnet_threshold(hist, edges + 1)
    with pytest.raises(InvalidInputError, match="odd number of bins, got 300"):
        presets.mxnet_threshold(hist[:-1], edges[:-1])
    with pytest.raises(InvalidInputError, match="at least num_quantized_bins = 511"):
        presets.mxnet_threshold(hist, edges, num_quantized_bins=511)


@pytest.mark.parametrize(
    ("find", "option", "most"),
    [
        (presets.tensorrt_slides_threshold, "num_quantized_bins", 300),
        (presets.ncnn_threshold, "target_bins", 300),
        (presets.modelopt_threshold, "num_bits", 16),
        (presets.modelopt_threshold, "stride", inf),
        (presets.modelopt_threshold, "start_bin", 301),
    ],
)
def test_options(find, option, most):
    hist, edges = valid(find)
    for wrong in (0, -1, *([] if isinf(most) else [most + 1])):
        with pytest.raises(InvalidInputError, match=f"`{option}` must be from 1 to {most}, got {wrong}"):
            find(hist, edges, **{option: wrong})
    for wrong in (2.0, True, "8"):
        with pytest.raises(ArrayTypeError, match=f"`{option}` must be an int, got {type(wrong).__name__}"):
            find(hist, edges, **{option: wrong})
    assert find(hist, edges, **{option: np.int64(5)}) == find(hist, edges, **{option: 5})


@every_absolute
def test_a_single_bin(find):
    with pytest.raises(InvalidInputError, match="`hist` must have at least 2 bins, got 1"):
        find(np.array([3]), np.array([0.0, 1.0]))


def test_a_flag_is_a_flag():
    hist, edges = np.arange(300), np.arange(301.0)
    with pytest.raises(ArrayTypeError, match="`unsigned` must be True or False, got str"):
        presets.modelopt_threshold(hist, edges, unsigned="no")
