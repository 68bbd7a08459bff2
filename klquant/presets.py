"""Thresholds as other tools choose them: MXNet, the TensorRT slides, ModelOpt, ncnn.

Each function reproduces one published search with its quirks, on the kind of histogram which that tool makes. It works
bin by bin in float64, on NumPy arrays. Use these functions to check thresholds from other tools, and
:func:`klquant.optimal_threshold` for new ones.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from klquant._namespace import array_namespace
from klquant._validate import check_flag, check_histogram, check_real, check_vector
from klquant.errors import ArrayTypeError, InfeasibleError, InvalidInputError

EPS = 1e-4  # MXNet replaces a zero count by this, and ncnn adds it to every normalised bin
__all__ = ["PresetThreshold", "modelopt_threshold", "mxnet_threshold", "ncnn_threshold", "tensorrt_slides_threshold"]


def __dir__() -> list[str]:
    return __all__


_Vector: TypeAlias = NDArray[np.float64]
_Bins: TypeAlias = NDArray[np.int64]
_Mask: TypeAlias = NDArray[np.bool_]


class PresetThreshold(NamedTuple):
    """A threshold found by a preset. ``float(threshold)`` is the value."""

    value: np.floating
    """T, in units of the edges."""
    index: Any  # np.int32, but mypy compares the type with that of `tuple.index`
    """Number of the candidate, from the narrowest."""
    divergence: np.float64
    """The divergence of this candidate as the original computes it, in nats."""

    def __float__(self) -> float:
        """Return the clipping value."""
        return float(self.value)


def mxnet_threshold(hist: np.ndarray, edges: np.ndarray, *, num_quantized_bins: int = 255) -> PresetThreshold:
    """Find the threshold of MXNet's entropy calibration.

    D_i = KL(smooth(P) || smooth(Q)) for half-widths ``i = num_quantized_bins // 2, .. centre``;
    T = ``edges[centre + i + 1]`` at the first minimum.

    Parameters
    ----------
    hist : np.ndarray, shape (num_bins,), integer counts, num_bins odd (MXNet: 8001)
    edges : np.ndarray, shape (num_bins + 1,), symmetric about 0, in units of the activation
    num_quantized_bins : int, odd, 3 to num_bins
        255 for int8. MXNet uses 511 for uint8, which it chooses for tensors without negative values.

    Returns
    -------
    PresetThreshold
        `value` in the dtype of `edges`, `index` from the narrowest candidate, `divergence` in nats.

    Raises
    ------
    InfeasibleError
        If no candidate can be smoothed. (MXNet returns the narrowest candidate or aborts.)
    InvalidInputError, ArrayTypeError
        As for :func:`klquant.optimal_threshold`; also if an array is a JAX array.

    Notes
    -----
    P has the left outliers in its first bin. S, from which Q is computed, has 0 there, without even that bin's own
    count. A group is ``m = (2 i + 1) // num_quantized_bins`` bins, and the last one also takes the remainder. Each bin
    with P != 0 gets the group's sum of S divided by its number of bins with S != 0. So Q gains mass where P has
    outliers and S has nothing. (klquant's own search divides by the number of bins with P != 0.) T is at least
    num_quantized_bins / num_bins of the range.

    Source: apache/mxnet, src/operator/quantization/calibrate.cc at 07b39423. `_get_optimal_threshold` in
    python/mxnet/contrib/quantization.py calls it since 1.6. It computes in float32, which can move a flat minimum.
    Before 1.6 the search was in Python: S kept its first bin, and bins with P != 0 were counted. (In 1.2, bins with
    S != 0 were counted, and the last bin was left out.)

    Examples
    --------
    >>> import numpy as np, klquant.presets
    >>> hist, edges = np.histogram(np.random.default_rng(0).laplace(size=100_000), bins=2001, range=(-12, 12))
    >>> print(f"{klquant.presets.mxnet_threshold(hist, edges).value:.3f}")
    10.345
    """
    _check_numpy(hist=hist, edges=edges)
    check_vector("hist", hist)
    check_histogram(hist, edges, num_quantized_bins)
    counts, centre = hist.astype(np.float64), hist.size // 2
    candidates = range(num_quantized_bins // 2, centre + 1)
    curve = _curve(counts, candidates, lambda half: _mxnet_divergence(counts, half, num_quantized_bins))
    return _threshold(curve, int(np.argmin(curve)), edges[centre + candidates.start + 1 :], edges)


def tensorrt_slides_threshold(hist: np.ndarray, edges: np.ndarray, *, num_quantized_bins: int = 128) -> PresetThreshold:
    """Find the threshold by the pseudocode of NVIDIA's TensorRT slides.

    D_m = KL(P || Q) over the first m bins, ``m = num_quantized_bins, .. num_bins - 1``. P has the outliers in its last
    bin, Q does not have them. T = ``(m + 0.5) * edges[-1] / num_bins`` at the first minimum.

    Parameters
    ----------
    hist : np.ndarray, shape (num_bins,), counts of absolute values (slides: 2048 bins)
    edges : np.ndarray, shape (num_bins + 1,), equal bins from 0, in units of the activation
    num_quantized_bins : int, 1 to num_bins - 1

    Returns
    -------
    PresetThreshold
        `value` in the dtype of `edges`, ``index = m - num_quantized_bins``, `divergence` in nats.

    Raises
    ------
    InfeasibleError
        If D is infinite for every candidate: the histogram is empty, or all its mass is in the last bin.
    InvalidInputError
        If `edges` has the wrong length, does not start at 0 or is not equally spaced; if a count is NaN, infinite or
        negative; if `num_quantized_bins` is out of range.
    ArrayTypeError
        If an array is not a NumPy array of real numbers.

    Notes
    -----
    The whole range (m = num_bins) is not a candidate, and T is at least num_quantized_bins + 0.5 bins. Nothing is
    smoothed, so D is infinite if P has outliers in a level that is empty without them. Empty bins of P stay empty in Q.
    The slides do not define the levels if their number does not divide m. Here bin k belongs to level
    ``k * num_quantized_bins // m``, as in NVIDIA's own Python code (:func:`modelopt_threshold`). TensorRT's source is
    not public, but calibration caches with T = (2048 + 0.5) bins show that it tries the whole range too.

    Source: S. Migacz, "8-bit inference with TensorRT", GTC 2017 (S7310), "Entropy Calibration - pseudocode".

    Examples
    --------
    >>> import numpy as np, klquant.presets
    >>> hist, edges = np.histogram(np.abs(np.random.default_rng(0).laplace(size=100_000)), bins=2048, range=(0, 12))
    >>> print(f"{klquant.presets.tensorrt_slides_threshold(hist, edges).value:.3f}")
    10.802
    """
    _check_absolute(hist, edges)
    _check_int("num_quantized_bins", num_quantized_bins, 1, hist.size - 1)
    counts, candidates = hist.astype(np.float64), range(num_quantized_bins, hist.size)
    curve = _curve(counts, candidates, lambda stop: _slides_divergence(counts, stop, num_quantized_bins))
    return _threshold(curve, int(np.argmin(curve)), _bin_centres(edges)[num_quantized_bins:], edges)


def modelopt_threshold(
    hist: np.ndarray,
    edges: np.ndarray,
    *,
    num_bits: int = 8,
    unsigned: bool = False,
    stride: int = 1,
    start_bin: int = 128,
) -> PresetThreshold:
    """Find the amax of the entropy calibration in NVIDIA's ModelOpt and pytorch-quantization.

    D_i = KL(P || Q) over the first i bins, ``i = start_bin, start_bin + stride, .. num_bins``;
    T = ``edges[i]`` at the last minimum.

    Parameters
    ----------
    hist : np.ndarray, shape (num_bins,), integer counts of absolute values (ModelOpt: 2048 bins, more as amax grows)
    edges : np.ndarray, shape (num_bins + 1,), equal bins from 0, in units of the activation
    num_bits : int, 1 to 16
    unsigned : bool
        Use ``L = 2 ** (num_bits - 1 + unsigned)`` levels. Bin k belongs to level ``k * L // i``.
    stride : int, at least 1
        Number of bins between two candidates.
    start_bin : int, 1 to num_bins
        Number of bins of the narrowest candidate.

    Returns
    -------
    PresetThreshold
        `value` in the dtype of `edges`, ``index = (i - start_bin) / stride``, `divergence` in nats.

    Raises
    ------
    InfeasibleError
        If all bins but the first are empty, or D is infinite for every candidate. (ModelOpt returns the widest one.)
    InvalidInputError, ArrayTypeError
        As for :func:`tensorrt_slides_threshold`.

    Notes
    -----
    Bin 0, where the zeros are, gets the count of bin 1. Of equal minima the last wins, which is the widest T. Nothing
    is smoothed, so D is infinite for a window that ends in an empty bin if there are outliers. For a window without
    counts D is NaN, and `np.argmin` takes NaN for the minimum. So if all values lie beyond start_bin, the widest empty
    window wins and all values are clipped. This function does the same, and returns a `divergence` of NaN.

    Source: `_compute_amax_entropy` in NVIDIA/Model-Optimizer, modelopt/torch/quantization/calib/histogram.py at
    74c4858e. NVIDIA/TensorRT, tools/pytorch-quantization/pytorch_quantization/calib/histogram.py at 1637a26e, finds the
    same, but overwrites bin 0 of the caller's histogram. With `torch_hist=False` their first edge is min |x|, which
    raises an error here.

    Examples
    --------
    >>> import numpy as np, klquant.presets
    >>> hist, edges = np.histogram(np.abs(np.random.default_rng(0).laplace(size=100_000)), bins=2048, range=(0, 12))
    >>> print(f"{klquant.presets.modelopt_threshold(hist, edges).value:.3f}")
    9.568
    """
    _check_absolute(hist, edges)
    for name, number, most in (
        ("num_bits", num_bits, 16),
        ("stride", stride, np.inf),
        ("start_bin", start_bin, hist.size),
    ):
        _check_int(name, number, 1, most)
    counts = hist.astype(np.float64)
    counts[0] = counts[1]
    levels, candidates = 1 << (num_bits - 1 + check_flag("unsigned", unsigned)), range(start_bin, hist.size + 1, stride)
    curve = _curve(counts, candidates, lambda stop: _modelopt_divergence(counts, stop, levels))
    return _threshold(curve, len(curve) - 1 - int(np.argmin(curve[::-1])), edges[start_bin::stride], edges)


def ncnn_threshold(hist: np.ndarray, edges: np.ndarray, *, target_bins: int = 128) -> PresetThreshold:
    """Find the threshold of ncnn's ncnn2table with the method kl.

    D_t = sum a log(a / b) over the first t bins, ``t = target_bins, .. num_bins - 1``;
    T = ``(t + 0.5) * edges[-1] / num_bins`` at the first minimum.

    Parameters
    ----------
    hist : np.ndarray, shape (num_bins,), counts of absolute values (ncnn: 2048 bins, exact zeros not counted)
    edges : np.ndarray, shape (num_bins + 1,), equal bins from 0, in units of the activation
    target_bins : int, 1 to num_bins - 1

    Returns
    -------
    PresetThreshold
        `value` in the dtype of `edges`, ``index = t - target_bins``, `divergence` in nats.

    Raises
    ------
    InfeasibleError
        If the histogram is empty. (ncnn returns the narrowest candidate.)
    InvalidInputError, ArrayTypeError
        As for :func:`tensorrt_slides_threshold`.

    Notes
    -----
    Let p = hist / sum(hist). Then a = p + eps, with the outliers in its last bin. Groups are t / target_bins bins wide,
    not rounded: a bin on a border belongs to both groups in proportion. Each group's mass is spread evenly over its
    bins, empty ones included, and b is the result plus eps. Neither is normalised again, so the clipped mass is missing
    in b. The whole range is not a candidate.

    Source: `QuantNet::quantize_KL` in Tencent/ncnn, tools/quantize/ncnn2table.cpp at 0207b6bc, unchanged since it was
    rewritten in 2021. It computes in float32, which can move a flat minimum. Before 2021, counts began at 1e-5 instead
    of eps, and empty bins got nothing.

    Examples
    --------
    >>> import numpy as np, klquant.presets
    >>> hist, edges = np.histogram(np.abs(np.random.default_rng(0).laplace(size=100_000)), bins=2048, range=(0, 12))
    >>> print(f"{klquant.presets.ncnn_threshold(hist, edges).value:.3f}")
    10.960
    """
    _check_absolute(hist, edges)
    _check_int("target_bins", target_bins, 1, hist.size - 1)
    counts, candidates = hist.astype(np.float64), range(target_bins, hist.size)
    p = counts / (counts.sum() or 1.0)
    curve = _curve(p, candidates, lambda stop: _ncnn_divergence(p, stop, target_bins))
    return _threshold(curve, int(np.argmin(curve)), _bin_centres(edges)[target_bins:], edges)


def _mxnet_divergence(counts: _Vector, half: int, levels: int) -> float:
    start, stop = counts.size // 2 - half, counts.size // 2 + half + 1
    p, sliced = _clipped(counts[start:], stop - start), counts[start:stop].copy()
    p[0] += counts[:start].sum()
    sliced[0] = 0
    starts = np.arange(levels) * (p.size // levels)
    return _kl(_smoothed(p), _smoothed(_levelled(sliced, sliced != 0, p != 0, starts)))


def _slides_divergence(counts: _Vector, stop: int, levels: int) -> float:
    p = _clipped(counts, stop)
    return _kl(p, _levelled(counts[:stop], p != 0, p != 0, _level_starts(stop, levels)))


def _modelopt_divergence(counts: _Vector, stop: int, levels: int) -> float:
    kept = counts[:stop] != 0
    q = _levelled(counts[:stop], kept, kept, _level_starts(stop, levels))
    return _kl(_clipped(counts, stop), q) if kept.any() else np.nan


def _ncnn_divergence(p: _Vector, stop: int, levels: int) -> float:
    bins, borders = np.arange(stop + 1.0), np.arange(levels + 1) * stop / levels
    cumulative = np.concatenate([[0.0], np.cumsum(p[:stop])])
    a, b = _clipped(p, stop) + EPS, np.diff(np.interp(bins, borders, np.interp(borders, bins, cumulative))) + EPS
    return float(np.sum(a * np.log(a / b)))


def _clipped(counts: _Vector, stop: int) -> _Vector:
    """Return the first `stop` counts, with all later ones added to the last."""
    clipped = counts[:stop].copy()
    clipped[-1] += counts[stop:].sum()
    return clipped


def _levelled(counts: _Vector, counted: _Mask, kept: _Mask, starts: _Bins) -> _Vector:
    """Return, in each kept bin, the total of its group divided by the number of counted bins in the group."""
    totals, numbers = np.add.reduceat(counts, starts), np.add.reduceat(counted, starts, dtype=np.float64)
    means = np.where(numbers > 0, totals / numbers, 0.0)
    return np.where(kept, np.repeat(means, np.diff(starts, append=counts.size)), 0.0)


def _level_starts(stop: int, levels: int) -> _Bins:
    """Return the first bin k of each level ``k * levels // stop`` (every bin, if there are more levels than bins)."""
    levels = min(levels, stop)
    return -(-np.arange(levels) * stop // levels)


def _smoothed(values: _Vector) -> _Vector:
    """Replace zeros by EPS and subtract the cost from the others; return NaN everywhere if that is infeasible."""
    zeros = values == 0
    taken = EPS * zeros.sum() / (~zeros).sum()
    smoothed = np.where(zeros, EPS, values - taken)
    return smoothed if taken < 1 and smoothed.min() > 0 else np.full_like(values, np.nan)


def _kl(p: _Vector, q: _Vector) -> float:
    p, q = p / p.sum(), q / q.sum()
    divergence = float(np.where(p > 0, p * np.log(p / q), p).sum())
    return np.inf if np.isnan(divergence) else divergence


def _curve(counts: _Vector, candidates: range, divergence: Callable[[int], float]) -> _Vector:
    if not counts.any():
        return np.full(len(candidates), np.inf)
    with np.errstate(all="ignore"):  # undefined results become NaN or infinite
        return np.array([divergence(candidate) for candidate in candidates])


def _threshold(curve: _Vector, index: int, values: np.ndarray, edges: np.ndarray) -> PresetThreshold:
    if curve[index] == np.inf:
        raise InfeasibleError(f"`hist` must have a feasible candidate, got none among {len(curve)}")
    dtype = edges.dtype if edges.dtype.kind == "f" else np.float64
    return PresetThreshold(values[index].astype(dtype), np.int32(index), curve[index])


def _bin_centres(edges: np.ndarray) -> _Vector:
    return (np.arange(edges.size - 1) + 0.5) * float(edges[-1]) / (edges.size - 1)


def _check_numpy(**arrays: object) -> None:
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            kind = f"{type(array).__module__}.{type(array).__qualname__}".removeprefix("builtins.")
            raise ArrayTypeError(f"`{name}` must be a NumPy array, got {kind}; convert it with np.asarray(...)")
        array_namespace(**{name: array})  # no masked array


def _check_int(name: str, value: int, minimum: int, maximum: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ArrayTypeError(f"`{name}` must be an int, got {type(value).__name__}")
    if not minimum <= value <= maximum:
        raise InvalidInputError(f"`{name}` must be from {minimum} to {maximum}, got {value}")


def _check_absolute(hist: np.ndarray, edges: np.ndarray) -> None:
    _check_numpy(hist=hist, edges=edges)
    check_vector("hist", hist)
    check_real("edges", edges)
    if hist.size < 2:
        raise InvalidInputError(f"`hist` must have at least 2 bins, got {hist.size}")
    if edges.shape != (hist.size + 1,):
        raise InvalidInputError(f"`edges` must have shape ({hist.size + 1},), one more than `hist`, got {edges.shape}")
    if edges[0] != 0:
        raise InvalidInputError(f"`edges` must start at 0, for a histogram of absolute values, got {edges[0]}")
    widths = np.diff(edges.astype(np.float64))
    if not (np.isfinite(widths).all() and widths.min() > 0):
        where = int(np.argmin(np.isfinite(widths) & (widths > 0)))
        raise InvalidInputError(
            f"`edges` must be finite and strictly increasing, got {edges[where]}, {edges[where + 1]} at index {where}"
        )
    rounding = 4 * np.finfo(edges.dtype).eps * float(edges[-1]) if edges.dtype.kind == "f" else 0.0
    if np.ptp(widths) > 0.01 * widths.mean() + rounding:
        raise InvalidInputError(f"`edges` must be equally spaced, got bins {widths.min()} to {widths.max()} wide")
