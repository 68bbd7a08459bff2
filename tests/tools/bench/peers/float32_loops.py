"""Peer: the search in the form that is copied from framework to framework.

It is a Python loop over the candidates. Inside it, one loop adds up the groups and another spreads them out again, with
small NumPy calls. P and Q are smoothed in float32. This version was written from the description.
"""

import numpy as np


def divergence_curve(hist, num_quantized_bins=255):
    """Return the divergence of every candidate half-width, from the narrowest."""
    centre, half_levels = len(hist) // 2, num_quantized_bins // 2
    divergence = np.zeros(centre - half_levels + 1)
    for half in range(half_levels, centre + 1):
        start, stop = centre - half, centre + half + 1
        sliced = hist[start:stop].copy()
        p = sliced.copy()
        p[0] += hist[:start].sum()
        p[-1] += hist[stop:].sum()
        sliced[0] = 0
        q = _spread(_merge(sliced, num_quantized_bins), p, num_quantized_bins)
        try:
            divergence[half - half_levels] = _relative_entropy(_smooth(p), _smooth(q))
        except ValueError:
            divergence[half - half_levels] = np.inf
    return divergence


def _merge(sliced, num_quantized_bins):
    size = sliced.size // num_quantized_bins
    merged = np.zeros(num_quantized_bins, dtype=np.int64)
    for j in range(num_quantized_bins):
        merged[j] = sliced[j * size : (j + 1) * size].sum()
    merged[-1] += sliced[num_quantized_bins * size :].sum()
    return merged


def _spread(merged, p, num_quantized_bins):
    size = p.size // num_quantized_bins
    filled = (p != 0).astype(np.int64)
    q = np.zeros(p.size, dtype=np.float32)
    for j in range(num_quantized_bins):
        low = j * size
        high = low + size if j < num_quantized_bins - 1 else p.size
        count = filled[low:high].sum()
        if count != 0:
            q[low:high] = float(merged[j]) / float(count)
    q[p == 0] = 0
    return q


def _smooth(values, eps=1e-4):
    is_zero = (values == 0).astype(np.float32)
    is_filled = (values != 0).astype(np.float32)
    zeros = is_zero.sum()
    filled = values.size - zeros
    if not filled:
        raise ValueError("nothing to smooth with")
    loss = eps * float(zeros) / float(filled)
    smoothed = values.astype(np.float32)
    smoothed += eps * is_zero - loss * is_filled
    if loss >= 1 or (smoothed <= 0).any():
        raise ValueError("the zeros cost more than there is")
    return smoothed


def _relative_entropy(p, q):
    p, q = p / p.sum(), q / q.sum()
    return np.sum(p * np.log(p / q))
